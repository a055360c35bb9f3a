"""The one kind of error that is written for the person at the terminal."""

from __future__ import annotations


class OctavesError(Exception):
    """Something the user can mend: the message says what was wrong, what is allowed and what to do next.

    Commands print it as one line; every other exception is a defect and keeps its traceback.
    """


class InputError(OctavesError, ValueError):
    """A value outside what is allowed: an id, a size, a setting."""
