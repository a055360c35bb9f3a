"""What commands raise for what a user can mend."""

from __future__ import annotations

from data.errors import OctavesError


class RunError(OctavesError):
    """A run folder, a device or a request that cannot be used as asked; the message says what to do."""
