"""Tokens for the prior: a LightningDataModule over a finished cache.

Reading a batch is one vectorized gather. Loaders return ids in the small type on disk, which are converted to int64 on
the device. Use it with ``Trainer(use_distributed_sampler=False)``: this module splits batches by rank in the main
process, because a loader process does not know its rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.layout import Tokens
from data.remote import is_remote
from data.stream import BucketedStream, IndexStream, LookAhead, ShardOrder, as_it_is, heed_parent_only
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest, read_manifest
from data.tokens.order import random_bits
from data.tokens.reader import TokenReader
from data.tokens.streamed import GIGABYTE, StreamedReader, open_tokens

Batch = dict[str, Tensor]
MOST_AHEAD = 1024
"""Maximum number of batches for which shards are downloaded ahead."""


@dataclass(frozen=True)
class CutAndNote:
    """Cuts the streams of a batch and adds the notes of a grammar, in the loader process."""

    max_length: int
    annotate: Callable[[Tokens], Tensor]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with ids [B, L ≤ max_length, F], length [B] and notes int32 [B, L, P]."""
        tokens = Tokens.from_batch(batch).prefix(self.max_length)
        return {**batch, "ids": tokens.ids, "length": tokens.lengths, "notes": self.annotate(tokens)}


def to_tensors(batch: dict[str, np.ndarray]) -> Batch:
    """Convert NumPy arrays to tensors without copying."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def widened(batch: Batch) -> Batch:
    """Convert the small types on disk to model types: ids to int64, captions to float32 states or int64 word ids."""
    batch = {**batch, "ids": batch["ids"].long()}
    if "text" in batch:
        batch["text"] = batch["text"].float() if batch["text"].is_floating_point() else batch["text"].long()
    return batch


class TrainingTokens(Dataset[Batch]):
    """Batches of the train split, indexed with lists of (epoch, position)."""

    def __init__(
        self,
        reader: TokenReader | StreamedReader,
        seed: int,
        with_text: bool = False,
        finish: CutAndNote | None = None,
    ) -> None:
        self.reader, self.seed, self.with_text, self.finish = reader, seed, with_text, finish

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        """ids [B, L, F] in the type on disk, label and index int64 [B]. (seed, epoch, position) determines the view."""
        epochs, positions = np.asarray(items, dtype=np.int64).T
        views = random_bits(self.seed, epochs, positions) % np.uint64(len(self.reader.manifest.views))
        batch = to_tensors(self.reader.read(positions, views.astype(np.int64), self.with_text))
        return batch if self.finish is None else self.finish(batch)


class ValidationTokens(Dataset[Batch]):
    """Batches of the first ``samples`` of a split, view 0, with the same number of batches on every rank.

    Positions past the last sample repeat sample 0 with ``weight`` 0.
    """

    def __init__(
        self,
        reader: TokenReader | StreamedReader,
        batch_size: int,
        samples: int,
        rank: int,
        world_size: int,
        with_text: bool = False,
        finish: CutAndNote | None = None,
    ) -> None:
        self.reader, self.with_text, self.finish = reader, with_text, finish
        self.samples = min(samples, len(reader))
        count = -(-self.samples // (batch_size * world_size))
        places = np.arange(count * world_size * batch_size).reshape(count, world_size, batch_size)
        self.places = places[:, rank]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Batch:
        """ids [B, L, F], label and index int64 [B], weight float32 [B]. Raises IndexError past the last batch."""
        places = self.places[number]
        real = places < self.samples
        batch = to_tensors(self.reader.read(np.where(real, places, 0), with_text=self.with_text))
        batch["weight"] = torch.from_numpy(real.astype(np.float32))
        return batch if self.finish is None else self.finish(batch)


class TokenDataModule(L.LightningDataModule):
    """Batches of cached tokens: ids int64 [B, L, F], label int64 [B], index (position in the cache) int64 [B].

    ``with_text`` adds text (states float32 [B, T, W] or word ids int64 [B, T, 1], padded with 0) and text_length int64
    [B], 0 for no caption, if the cache has encoded captions.

    Layouts of variable length add length int64 [B]; layouts with side information add header int64 [B, S]. After
    ``cut_and_note`` there are also notes int32 [B, L, P]. With ``bucket_batches`` above 1, samples of a training batch
    have similar length.

    Validation batches also have weight float32 [B]. A LightningModule that counts its batches as ``batches_seen``
    resumes in the middle of an epoch.

    ``shuffle_shards`` is the number of shards to shuffle together, 0 for all. For a cache at a URL,
    ``$OCTAVES_DATA/tokens`` holds at most ``local_gigabytes``. Raises CacheError if the cache is missing or damaged, or
    cannot be streamed with these settings.
    """

    def __init__(
        self,
        tokens_path: str | Path,
        batch_size: int,
        num_workers: int,
        seed: int,
        validation_samples: int,
        with_text: bool = False,
        bucket_batches: int = 1,
        shuffle_shards: int = 0,
        local_gigabytes: float = 20.0,
    ) -> None:
        super().__init__()
        self.tokens_path, self.local_gigabytes, self.shuffle_shards = str(tokens_path), local_gigabytes, shuffle_shards
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.validation_samples = validation_samples
        content = read_manifest(tokens_path)  # read once: at a URL it may change or vanish during training
        self.manifest = Manifest.parse(content, tokens_path)
        self.manifest_sha256 = hashlib.sha256(content).hexdigest()
        self.with_text = with_text and self.manifest.text is not None
        self.bucket_batches = bucket_batches
        self._finish: CutAndNote | None = None
        if is_remote(self.tokens_path):
            self._check_streaming()

    def reader(self, split: str) -> TokenReader | StreamedReader:
        """Reader of one split of the cache. Raises CacheError."""
        return open_tokens(self.tokens_path, split, self.local_gigabytes, self.manifest)

    def _check_streaming(self) -> None:
        """Raise CacheError if shards would be downloaded repeatedly, or if all lengths are needed in advance."""
        if self.manifest.layout.ends != "fixed" and self.bucket_batches > 1:
            raise CacheError(
                f"{self.tokens_path}: these tokens vary in length, and batches of similar length "
                f"(prior_training.bucket_batches={self.bucket_batches}) need all lengths in advance; copy the cache to "
                "this machine, or set prior_training.bucket_batches=1"
            )
        sizes = sorted(shard.bytes for shard in self.manifest.split("train").shards)
        window = self.shuffle_shards or len(sizes)
        # at most three windows: the current one, a short last one of an epoch, and the one downloaded ahead
        needed = sum(sizes[-3 * window :]) + max(shard.bytes for shard in self.manifest.split("val").shards)
        if needed > self.local_gigabytes * GIGABYTE:
            shuffled = f"{window} shards" if self.shuffle_shards else "all shards"
            raise CacheError(
                f"tokens.local_gigabytes={self.local_gigabytes:g}, but samples are drawn from {shuffled} at a time "
                f"(prior_training.shuffle_shards={self.shuffle_shards}), which takes {needed / GIGABYTE:.3g} GB; set "
                f"prior_training.shuffle_shards to 1 or a few, or tokens.local_gigabytes to that"
            )

    def cut_and_note(self, max_length: int, annotate: Callable[[Tokens], Tensor]) -> None:
        """Make loaders cut streams to ``max_length`` elements and add the notes of a grammar to each batch."""
        self._finish = CutAndNote(max_length, annotate)

    def lengths_report(self) -> str:
        """Statistics of the lengths of training streams, and how many are cut, as text."""
        reader = self.reader("train")
        if isinstance(reader, StreamedReader):
            return f"{self.tokens_path}: streamed, so lengths are not known in advance"
        lengths = reader.lengths
        report = f"{self.tokens_path}: {lengths.mean():.1f} elements on average, {lengths.max(initial=0)} at most"
        if self._finish is None:
            return report
        max_length = self._finish.max_length
        cut = int((lengths > max_length).sum())
        share = cut / max(1, len(lengths))
        return f"{report}; {cut} of {len(lengths)} ({share:.2%}) are longer than prior.max_length={max_length} and cut"

    def train_dataloader(self) -> DataLoader[Batch]:
        """An endless loader: the trainer counts steps."""
        reader = self.reader("train")
        module = getattr(self.trainer, "lightning_module", None)
        rank, world_size = self._place()
        sizes = [shard.count for shard in self.manifest.split("train").shards]
        order = ShardOrder(sizes, self.shuffle_shards) if self.shuffle_shards else None
        place = (self.batch_size, rank, world_size, self.seed, getattr(module, "batches_seen", 0), order)
        stream: Sampler[list[tuple[int, int]]]
        if isinstance(reader, StreamedReader):
            window = sum(sorted(sizes)[-self.shuffle_shards :])
            ahead = min(window // (self.batch_size * world_size), MOST_AHEAD)
            stream = LookAhead(IndexStream(len(reader), *place), ahead, reader.announce)
        elif reader.layout.ends != "fixed" and self.bucket_batches > 1:
            stream = BucketedStream(reader.lengths, self.bucket_batches, *place)
        else:
            stream = IndexStream(len(reader), *place)
        return self._loader(TrainingTokens(reader, self.seed, self.with_text, self._finish), batch_sampler=stream)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The first ``validation_samples`` of the val split, with the same number of batches on every rank."""
        reader = self.reader("val")
        rank, world_size = self._place()
        tokens = ValidationTokens(
            reader, self.batch_size, self.validation_samples, rank, world_size, self.with_text, self._finish
        )
        return self._loader(tokens, batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Convert ids and captions to the types of models on the device; small types make the transfer faster."""
        return widened(batch)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: Dataset[Batch], **kwargs: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_it_is,
            worker_init_fn=heed_parent_only,
            # Own generator for the seeds of workers: reading must not change torch's random state (exact resume).
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )
