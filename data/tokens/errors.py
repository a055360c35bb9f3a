"""What can be wrong with a token cache."""

from __future__ import annotations

from data.errors import OctavesError


class CacheError(OctavesError):
    """A token cache that is missing, damaged, or does not belong; the message says what to do."""
