"""Disk cache of arrays that are slow to compute and that later evaluations of a run need again."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.files import write_atomically


def kept(path: Path, made_of: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Load arrays from ``path``, or compute them with ``make()`` and save them there.

    ``made_of`` is a hash of everything that the arrays depend on. They are computed again if the file has another hash
    or is damaged. If the file cannot be written, the arrays are returned without saving.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["made_of"]) == made_of:
                return {name: file[name] for name in file.files if name != "made_of"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    arrays = make()
    content = io.BytesIO()
    np.savez(content, made_of=np.array(made_of), **arrays)  # type: ignore[arg-type]
    with suppress(OSError):
        write_atomically(path, content.getbuffer())
    return arrays
