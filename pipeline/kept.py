"""Arrays that take long to make and that later evaluations of a run need again: kept in one file until they change."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.files import write_atomically


def kept(path: Path, made_of: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The arrays in ``path`` if they were made of ``made_of``, a hash of all that decides them; else ``make()``, which
    is written there. A damaged file is made again; where nothing can be written, nothing is kept."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["made_of"]) == made_of:
                return {name: file[name] for name in file.files if name != "made_of"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    arrays = make()
    content = io.BytesIO()
    np.savez(content, made_of=np.array(made_of), **arrays)
    with suppress(OSError):
        write_atomically(path, content.getbuffer())
    return arrays
