"""Errors written for the user at the terminal."""

from __future__ import annotations


class OctavesError(Exception):
    """An error the user can fix: the message says what was wrong, what is allowed and what to do next.

    Commands print it as one line. Every other exception is a bug and keeps its traceback.
    """


class InputError(OctavesError, ValueError):
    """An invalid value: an id, a size or a setting."""
