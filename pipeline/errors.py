"""Error that commands raise for problems that the user can fix."""

from __future__ import annotations

from data.errors import OctavesError


class RunError(OctavesError):
    """A run folder, device or request that cannot be used. The message says what to do."""
