"""Cache arrays that are slow to compute in a file, for later evaluations of the same run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.files import write_atomically


def kept(path: Path, made_of: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The arrays stored in ``path``, or those of ``make()``, which are then stored there.

    ``made_of`` is a hash of everything that determines them: a file with another hash, or a damaged one, is made again.
    If the file cannot be written, the arrays are returned without being kept.
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
