"""Datasets of image views for training, caching and evaluation.

A training set of millions has a few broken files, and these should not stop a run after a day, so training replaces
corrupt images. In caching and evaluation a broken file changes results, so there it is an error by default.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.images.config import ImagesConfig
from data.images.source import CorruptImage, ImagesError, ImageSource
from data.images.views import flips, train_pixels, view_pixels

MIN_TRIED = 100
"""The share of corrupt images is checked only after this many images, since the first few say little."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefix the message of an ImagesError with the name of the image, which a view does not know."""
    try:
        yield
    except ImagesError as error:
        raise ImagesError(f"{key}: {error}") from error


class TooManyCorrupt(ImagesError):
    """More unreadable images than ``images.max_corrupt_share`` allows."""


class CorruptTally:
    """Counts of images tried and images found corrupt, shared by the loader workers of one process."""

    def __init__(self, num_images: int, max_share: float, num_workers: int = 0) -> None:
        self.max_share = max_share
        # One row for each worker and one for the main process. Each process writes only its row, so no lock is needed.
        self.counts = torch.zeros(num_workers + 1, 2, dtype=torch.int64).share_memory_()
        self.named = torch.zeros(num_images, dtype=torch.bool).share_memory_()

    @property
    def tried(self) -> int:
        """Images tried so far."""
        return int(self.counts[:, 0].sum())

    @property
    def corrupt(self) -> int:
        """Unreadable images so far. An image that is tried again counts again."""
        return int(self.counts[:, 1].sum())

    def add(self, index: int, error: CorruptImage | None) -> None:
        """Count one try, and warn once per corrupt image. Raises TooManyCorrupt above ``max_share``."""
        worker = get_worker_info()
        row = self.counts[-1 if worker is None else worker.id]
        row[0] += 1
        if error is None:
            return
        row[1] += 1
        if not self.named[index]:
            self.named[index] = True
            warnings.warn(f"skipped an unreadable image: {error}", stacklevel=2)
        tried, corrupt = self.tried, self.corrupt
        if tried >= MIN_TRIED and corrupt > self.max_share * tried:
            raise TooManyCorrupt(
                f"{corrupt} of {tried} images could not be read, more than images.max_corrupt_share="
                f"{self.max_share}; the last one: {error}"
            )


class TrainDataset(Dataset[dict[str, Tensor]]):
    """Training views, indexed with lists of (epoch, index) from ``IndexStream``, one list per batch.

    A batch is ``{"pixels": uint8 [B, C, H, W], "label": int64 [B], "index": int64 [B]}``. The next readable image
    replaces a corrupt one, and ``index`` is then that of the replacement. Raises TooManyCorrupt above
    ``max_corrupt_share``.
    """

    def __init__(self, source: ImageSource, config: ImagesConfig, seed: int, num_workers: int = 0) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.tally = CorruptTally(len(source), config.max_corrupt_share, num_workers)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        rows = [self.read(epoch, index) for epoch, index in places]
        pixels, labels, indices = zip(*rows, strict=True)
        return {"pixels": torch.stack(pixels), "label": torch.tensor(labels), "index": torch.tensor(indices)}

    def read(self, epoch: int, index: int) -> tuple[Tensor, int, int]:
        """(pixels, label, index) of the image at ``index``, or of the next readable image."""
        error = None
        for step in range(len(self.source)):
            candidate = (index + step) % len(self.source)
            try:
                sample = self.source[candidate]
            except CorruptImage as corrupt:
                error = corrupt
                self.tally.add(candidate, corrupt)
                continue
            self.tally.add(candidate, None)
            with naming(sample.key):
                return train_pixels(sample.image, self.config, self.seed, epoch, candidate), sample.label, candidate
        raise TooManyCorrupt(f"none of the {len(self.source)} images could be read; the last one: {error}")


class PreloadedDataset(Dataset[dict[str, Tensor]]):
    """Training views of a small source with a deterministic view, in one array; batches as in ``TrainDataset``.

    The pixels equal those of ``TrainDataset``, without decoding in the loop. Such datasets are installed as packages,
    so an unreadable image means a damaged installation and raises CorruptImage immediately.
    """

    def __init__(self, source: ImageSource, config: ImagesConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.pixels = torch.empty(len(source), config.channels, config.size, config.size, dtype=torch.uint8)
        self.labels = torch.empty(len(source), dtype=torch.int64)
        for index in range(len(source)):
            sample = source[index]
            with naming(sample.key):
                self.pixels[index] = view_pixels(sample.image, config, config.train_view)
            self.labels[index] = sample.label

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        indices = torch.tensor([index for _, index in places])
        pixels = self.pixels[indices]
        if self.config.flip:
            flip = torch.tensor([flips(self.seed, epoch, index) for epoch, index in places])
            pixels[flip] = pixels[flip].flip(-1)
        return {"pixels": pixels, "label": self.labels[indices], "index": indices}


@dataclass(frozen=True)
class EvalView:
    """One image for caching or evaluation."""

    pixels: Tensor
    """uint8 [C, size, size]; zeros if not readable."""
    label: int
    """-1 for none."""
    text: str
    """Empty for none."""
    key: str
    index: int
    """Index into the source."""
    readable: bool
    """False for a corrupt image that ``skip_corrupt`` skips."""


def validation_indices(length: int, count: int, seed: int) -> list[int]:
    """The first ``count`` indices (at most all) of a fixed permutation of a validation split of ``length`` images."""
    return np.random.default_rng([seed, length]).permutation(length)[:count].tolist()


def read_eval(
    source: ImageSource, index: int, config: ImagesConfig, view: str = "eval", flip: bool = False
) -> EvalView:
    """A deterministic view; ``eval`` means ``config.eval_view``.

    Raises CorruptImage unless ``config.skip_corrupt`` is set. Raises ImagesError, naming the image, if it does not fit
    the view.
    """
    try:
        sample = source[index]
    except CorruptImage:
        if not config.skip_corrupt:
            raise
        blank = torch.zeros(config.channels, config.size, config.size, dtype=torch.uint8)
        return EvalView(blank, -1, "", source.key(index), index, readable=False)
    with naming(sample.key):
        pixels = view_pixels(sample.image, config, config.eval_view if view == "eval" else view, flip)
    return EvalView(pixels, sample.label, sample.text, sample.key, index, readable=True)


def pixels_of(
    source: ImageSource, indices: Sequence[int], config: ImagesConfig, view: str = "eval", flip: bool = False
) -> Tensor:
    """Deterministic views, uint8 [n, C, size, size]. ``skip_corrupt`` leaves out corrupt images.

    Raises the errors of ``read_eval``.
    """
    views = (read_eval(source, int(index), config, view, flip) for index in indices)
    rows = [view.pixels for view in views if view.readable]
    return torch.stack(rows) if rows else torch.empty(0, config.channels, config.size, config.size, dtype=torch.uint8)
