"""Base class of image sources, and helpers that sources share."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import OctavesError


class ImagesError(OctavesError):
    """Missing, damaged or unsuitable images; the message says what to do."""


class CorruptImage(ImagesError):
    """An unreadable image: ``key`` is its name, ``reason`` the cause."""

    def __init__(self, key: str, reason: str = "") -> None:
        # PyTorch re-raises a worker's exception with its message as the only argument, so the reason is optional.
        super().__init__(f"{key}: {reason}" if reason else key)
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One image as stored, before any view."""

    image: Image.Image | np.ndarray
    """A loaded PIL image of any mode, or uint8 [H, W] or [H, W, 3]."""
    label: int
    """Index into the source's ``class_names``; -1 for none."""
    text: str
    """Caption; empty for none."""
    key: str
    """Name of the image, unique in its source."""


class ImageSource(ABC):
    """Dataset of images with random access. Instances are copied to loader workers, so they store data compactly."""

    class_names: tuple[str, ...] = ()
    small: bool = False
    """True if all images fit in memory and are decoded quickly at the start."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The image at ``index``. Raises CorruptImage if it cannot be read."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of the image at ``index``, without reading it."""

    def text(self, index: int) -> str:
        """The caption at ``index``, empty for none. Raises CorruptImage if it cannot be read."""
        return self[index].text

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over names, sizes and captions. Equal datasets have equal fingerprints; no pixel is decoded."""


class Subset(ImageSource):
    """The images ``indices`` (int64 [n]) of a source, in that order."""

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.class_names = source.class_names
        self.small = source.small

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[index])]

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def text(self, index: int) -> str:
        return self.source.text(int(self.indices[index]))

    def fingerprint(self) -> str:
        return sha256_of([self.source.fingerprint().encode(), self.indices.tobytes()])


class PackedStrings(Sequence[str]):
    """Many strings in one buffer. A list of a million names would take 100 MB in every loader worker."""

    def __init__(self, strings: Iterable[str] = (), *, packed: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Pack ``strings``, or use a pair (uint8 [bytes], int64 [n + 1] borders) from ``arrays``."""
        if packed is None:
            encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
            borders = np.zeros(len(encoded) + 1, dtype=np.int64)
            np.cumsum([len(item) for item in encoded], out=borders[1:])
            packed = np.frombuffer(b"".join(encoded), dtype=np.uint8), borders
        self.arrays = packed

    def __len__(self) -> int:
        return len(self.arrays[1]) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        data, borders = self.arrays
        return data[borders[index] : borders[index + 1]].tobytes().decode("utf-8", "surrogateescape")


def sha256_of(parts: Iterable[bytes]) -> str:
    """Hex sha256 of parts. Each part is preceded by its length, so the borders between parts are hashed too."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def decode(data: bytes | Path, key: str) -> Image.Image:
    """A loaded PIL image from bytes or a file. Raises CorruptImage for every error of the decoder."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise almost any exception for invalid bytes
        raise CorruptImage(key, f"{type(error).__name__}: {error}") from error


def hashed_order(keys: Iterable[str], seed: int) -> np.ndarray:
    """A permutation int64 [n], sorted by the hash of (seed, key). New images hardly change the order of old ones."""
    salt = f"{seed}/".encode()
    hashes = [
        int.from_bytes(hashlib.blake2b(salt + key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
        for key in keys
    ]
    return np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")


def seeded_split(source: ImageSource, split: str, val_share: float, seed: int) -> Subset:
    """The train or val split of a source without its own split.

    Raises ImagesError for fewer than two images, since each split needs one.
    """
    if len(source) < 2:
        raise ImagesError(f"{len(source)} image(s) cannot be split into train and val; give images.val_path")
    order = hashed_order((source.key(index) for index in range(len(source))), seed)
    num_val = min(max(1, round(val_share * len(source))), len(source) - 1)
    # Training shuffles anyway, so its split keeps the order on disk. The val split stays shuffled, because training
    # validates on its first few hundred images, which should cover all classes.
    return Subset(source, order[:num_val] if split == "val" else np.sort(order[num_val:]))
