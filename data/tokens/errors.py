"""Errors of token caches."""

from __future__ import annotations

from data.errors import OctavesError


class CacheError(OctavesError):
    """A token cache is missing, damaged, or of another tokenizer; the message says what to do."""
