"""Where data sets lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """The folder of data sets: ``$OCTAVES_DATA``, by default ``~/.cache/octaves``. It need not exist yet."""
    return Path(os.environ.get("OCTAVES_DATA") or "~/.cache/octaves").expanduser()
