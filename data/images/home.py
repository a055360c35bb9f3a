"""Location of datasets on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """The folder of datasets: ``$OCTAVES_DATA``, by default ``~/.cache/octaves``. It may not exist yet."""
    return Path(os.environ.get("OCTAVES_DATA") or "~/.cache/octaves").expanduser()
