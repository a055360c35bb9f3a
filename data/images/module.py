"""Images for stage 1: a LightningDataModule over any source.

Notes:

- The trainer needs ``use_distributed_sampler=False``. All ranks share one ``IndexStream``, which gets rank and world
  size here, in the main process.
- The loaders draw the seeds of their workers from their own generator. So reading data does not change torch's global
  random state, and a resumed run stays exact.
- Loaders return uint8 pixels, which are converted to floats on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.images.config import ImagesConfig
from data.images.reading import EvalView, PreloadedDataset, TrainDataset, read_eval, validation_indices
from data.images.source import ImageSource
from data.images.sources import open_source
from data.images.views import DETERMINISTIC_VIEWS, to_float
from data.stream import IndexStream, as_it_is, heed_parent_only

MAX_PRELOADED_BYTES = 1 << 30
Batch = dict[str, Tensor]


class ImageDataModule(L.LightningDataModule):
    """Endless training batches and a fixed set of validation images.

    Training batches: ``{"pixels": [B, C, H, W], "label": int64 [B], "index": int64 [B]}``. Pixels are uint8 from the
    loader and float32 in [-1, 1] in the steps of the model. The loader has no length, so give the trainer ``max_steps``
    and an integer ``val_check_interval`` with ``check_val_every_n_epoch=None``. It starts at batch number
    ``lightning_module.batches_seen`` (0 if missing), which a module restores from its checkpoint.

    Validation batches have the same keys and ``"weight": float32 [B]``. The weight is 0 for padding (all ranks take the
    same number of batches) and for corrupt images skipped by ``skip_corrupt``. The images are the first
    ``validation_images`` of a fixed permutation of the validation split, so they cover all classes.

    Training images are read at ``oversampling`` times ``config.size``.
    """

    def __init__(
        self,
        config: ImagesConfig,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        validation_images: int = 256,
        oversampling: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.train_config = replace(config, size=config.size * oversampling)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.validation_images = validation_images
        self._sources: dict[str, ImageSource] = {}

    def source(self, split: str) -> ImageSource:
        """The ``train`` or ``val`` source, opened once. Raises the errors of ``open_source``."""
        if split not in self._sources:
            self._sources[split] = open_source(self.config, split)  # type: ignore[arg-type]
        return self._sources[split]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty for a dataset without labels."""
        return self.source("train").class_names

    def train_dataloader(self) -> DataLoader[Batch]:
        source = self.source("train")
        rank, world_size = self._place()
        module = getattr(self.trainer, "lightning_module", None)
        start_batch = int(getattr(module, "batches_seen", 0))
        stream = IndexStream(len(source), self.batch_size, rank, world_size, self.seed, start_batch)
        if self._fits_in_memory(source):
            return self._loader(PreloadedDataset(source, self.train_config, self.seed), stream, num_workers=0)
        dataset = TrainDataset(source, self.train_config, self.seed, self.num_workers)
        return self._loader(dataset, stream, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        source = self.source("val")
        rank, world_size = self._place()
        indices = validation_indices(len(source), self.validation_images, self.config.split_seed)
        dataset = ValidationDataset(source, self.config, indices, keep=source.small)
        sampler = PaddedBatches(len(indices), self.batch_size, rank, world_size)
        return self._loader(dataset, sampler, 0 if source.small else self.num_workers)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 pixels become float32 in [-1, 1]."""
        if batch["pixels"].dtype == torch.uint8:
            batch = {**batch, "pixels": to_float(batch["pixels"])}
        return batch

    def _place(self) -> tuple[int, int]:
        """(rank, world size); (0, 1) without a trainer."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _fits_in_memory(self, source: ImageSource) -> bool:
        """True if all training views can be preloaded: a small source with a view that is random only in its flips."""
        num_bytes = len(source) * self.config.channels * self.train_config.size**2
        return source.small and self.config.train_view in DETERMINISTIC_VIEWS and num_bytes <= MAX_PRELOADED_BYTES

    def _loader(self, dataset: Dataset[Any], batches: Sampler[Any], num_workers: int) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=as_it_is,
            worker_init_fn=heed_parent_only,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )


class PaddedBatches(Sampler[list[tuple[int, float]]]):
    """Batches of (position, weight) for one rank over ``length`` rows. All ranks get the same number of full batches.

    Rows past the end repeat position 0 with weight 0.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for step in range(len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(place, 1.0) if place < self.length else (0, 0.0) for place in range(start, start + self.batch_size)]


class ValidationDataset(Dataset[Batch]):
    """Weighted eval views, indexed with lists of (position, weight), one list per batch. ``keep`` caches the views.

    Raises CorruptImage, unless ``config.skip_corrupt`` is set: then the row has weight 0.
    """

    def __init__(self, source: ImageSource, config: ImagesConfig, indices: list[int], keep: bool = False) -> None:
        self.source = source
        self.config = config
        self.indices = indices
        self.kept: dict[int, EvalView] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, position: int) -> EvalView:
        """The view at a position of ``indices``."""
        if self.kept is None:
            return read_eval(self.source, self.indices[position], self.config)
        if position not in self.kept:
            self.kept[position] = read_eval(self.source, self.indices[position], self.config)
        return self.kept[position]

    def __getitem__(self, place: tuple[int, float]) -> Batch:
        return self.__getitems__([place])

    def __getitems__(self, places: list[tuple[int, float]]) -> Batch:
        views = [self.read(position) for position, _ in places]
        weights = [weight * view.readable for (_, weight), view in zip(places, views, strict=True)]
        return {
            "pixels": torch.stack([view.pixels for view in views]),
            "label": torch.tensor([view.label for view in views]),
            "index": torch.tensor([view.index for view in views]),
            "weight": torch.tensor(weights, dtype=torch.float32),
        }
