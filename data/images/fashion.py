"""Fashion-MNIST from its four idx files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np

from data.images.config import ImagesConfig
from data.images.home import data_home
from data.images.source import ImagesError, ImageSource, Sample, sha256_of

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PREFIXES = {"train": "train", "val": "t10k"}


class FashionSource(ImageSource):
    """60,000 training and 10,000 validation images in gray, uint8 [28, 28], in 10 classes. Captions are class names.

    Raises ImagesError, which says how to get the files or which file is damaged.
    """

    class_names = CLASS_NAMES
    small = True

    def __init__(self, config: ImagesConfig, split: Literal["train", "val"]) -> None:
        folder = find_folder(config)
        self.prefix = PREFIXES[split]
        self.images = read_idx(folder, f"{self.prefix}-images-idx3-ubyte", 3)
        self.labels = read_idx(folder, f"{self.prefix}-labels-idx1-ubyte", 1)
        if len(self.images) != len(self.labels):
            raise ImagesError(
                f"{folder}: {len(self.images)} images but {len(self.labels)} labels; fetch the files again"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        label = int(self.labels[index])
        return Sample(self.images[index], label, CLASS_NAMES[label], self.key(index))

    def key(self, index: int) -> str:
        return f"{self.prefix}/{index:05d}"

    def fingerprint(self) -> str:
        return sha256_of([self.images.tobytes(), self.labels.tobytes()])


def find_folder(config: ImagesConfig) -> Path:
    """The folder with the idx files. Raises ImagesError, which lists the folders searched and how to get the files."""
    roots = [Path(config.path).expanduser()] if config.path else [data_home()]
    candidates = [root / below for root in roots for below in (".", "fashion-mnist", "FashionMNIST/raw")]
    if not config.path:
        candidates.append(Path("/usr/share/datasets/fashion-mnist"))
    for folder in candidates:
        if find_file(folder, "train-images-idx3-ubyte") is not None:
            return folder
    raise ImagesError(
        f"Fashion-MNIST is in none of {', '.join(str(folder) for folder in candidates)}. Install it with "
        "`apt-get install dataset-fashion-mnist`, or download it with "
        f"`python -c \"import torchvision; torchvision.datasets.FashionMNIST('{data_home()}', download=True)\"`"
    )


def find_file(folder: Path, name: str) -> Path | None:
    """Path of the idx file ``name`` in ``folder``, compressed or not; None if missing."""
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def read_idx(folder: Path, name: str, num_dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file. Raises ImagesError if it is missing or damaged."""
    path = find_file(folder, name)
    if path is None:
        raise ImagesError(f"{folder / name}.gz is missing beside the other Fashion-MNIST files")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ImagesError(f"{path} is damaged ({error}); fetch it again") from error
    start = 4 + 4 * num_dimensions
    shape = tuple(np.frombuffer(data[4:start], dtype=">u4").tolist())
    # Bytes 0-2 of an idx file mean "unsigned bytes", byte 3 is the number of dimensions.
    if data[:4] != bytes([0, 0, 8, num_dimensions]) or len(data) - start != int(np.prod(shape)):
        raise ImagesError(f"{path} is damaged: not a complete idx file of {num_dimensions} dimensions; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
