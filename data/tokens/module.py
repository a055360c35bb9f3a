"""Tokens for the prior: a LightningDataModule over a finished cache.

A batch costs one vectorised gather; ids travel in the small type on disk and become int64 on the device. Use it with
``Trainer(use_distributed_sampler=False)``: the batches are split by rank here, in the main process, because a loader
process cannot know its rank.
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
"""Batches whose shards are announced before their turn, at most."""


@dataclass(frozen=True)
class CutAndNote:
    """Cuts the streams of a batch and adds the notes of a grammar to it, in the loader's process."""

    max_length: int
    annotate: Callable[[Tokens], Tensor]

    def __call__(self, batch: Batch) -> Batch:
        """The batch with ids [B, L ≤ max_length, F], length [B] and notes int32 [B, L, P]."""
        tokens = Tokens.from_batch(batch).prefix(self.max_length)
        return {**batch, "ids": tokens.ids, "length": tokens.lengths, "notes": self.annotate(tokens)}


def to_tensors(batch: dict[str, np.ndarray]) -> Batch:
    """NumPy arrays to tensors, without a copy."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def widened(batch: Batch) -> Batch:
    """Ids as int64, captions as float32 states or int64 word ids: what models take, from the small types on disk."""
    batch = {**batch, "ids": batch["ids"].long()}
    if "text" in batch:
        batch["text"] = batch["text"].float() if batch["text"].is_floating_point() else batch["text"].long()
    return batch


class TrainingTokens(Dataset[Batch]):
    """Whole batches of the train split, asked for by lists of (epoch, position)."""

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
        """ids [B, L, F] in the type on disk, label and index int64 [B]; the view is drawn by (seed, epoch, index)."""
        epochs, positions = np.asarray(items, dtype=np.int64).T
        views = random_bits(self.seed, epochs, positions) % np.uint64(len(self.reader.manifest.views))
        batch = to_tensors(self.reader.read(positions, views.astype(np.int64), self.with_text))
        return batch if self.finish is None else self.finish(batch)


class ValidationTokens(Dataset[Batch]):
    """Batch by batch the first samples of a split, view 0, with as many batches on every rank.

    Places behind the last sample repeat sample 0 with ``weight`` 0.
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
        """ids [B, L, F], label and index int64 [B], weight float32 [B]. Raises IndexError behind the last batch."""
        places = self.places[number]
        real = places < self.samples
        batch = to_tensors(self.reader.read(np.where(real, places, 0), with_text=self.with_text))
        batch["weight"] = torch.from_numpy(real.astype(np.float32))
        return batch if self.finish is None else self.finish(batch)


class TokenDataModule(L.LightningDataModule):
    """Batches of cached tokens: ids int64 [B, L, F], label int64 [B], index (position in the cache) int64 [B].

    With ``with_text``, where the cache has encoded captions, also text (states float32 [B, T, W] or word ids int64
    [B, T, 1], padded with 0) and text_length int64 [B], 0 for no caption.

    Layouts of variable length add length int64 [B], with side information header int64 [B, S]; after ``cut_and_note``
    also notes int32 [B, L, P]. Their training batches hold samples of about one length.

    Validation batches also have weight float32 [B]. A trained module that counts its batches as ``batches_seen``
    resumes in the middle of an epoch.

    ``shuffle_shards`` says how many shards are mixed at a time, 0 for all; for a cache at a URL,
    ``$OCTAVES_DATA/tokens`` holds at most ``local_gigabytes``. Raises CacheError when the cache is missing or damaged,
    and where it cannot be streamed like this.
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
        content = read_manifest(tokens_path)  # once: at a URL there may be another one, or none, when training ends
        self.manifest = Manifest.parse(content, tokens_path)
        self.manifest_sha256 = hashlib.sha256(content).hexdigest()
        self.with_text = with_text and self.manifest.text is not None
        self.bucket_batches = bucket_batches
        self._finish: CutAndNote | None = None
        if is_remote(self.tokens_path):
            self._check_streaming()

    def reader(self, split: str) -> TokenReader | StreamedReader:
        """The cache's samples by position. Raises CacheError."""
        return open_tokens(self.tokens_path, split, self.local_gigabytes, self.manifest)

    def _check_streaming(self) -> None:
        """Raise CacheError where shards would be fetched again and again, or lengths must be known before they come."""
        if self.manifest.layout.ends != "fixed" and self.bucket_batches > 1:
            raise CacheError(
                f"{self.tokens_path}: these tokens vary in length, and batches of about one length "
                f"(prior_training.bucket_batches={self.bucket_batches}) need all lengths at once; copy the cache to "
                "this machine, or set prior_training.bucket_batches=1"
            )
        sizes = sorted(shard.bytes for shard in self.manifest.split("train").shards)
        window = self.shuffle_shards or len(sizes)
        # of three windows at most: the one that is read, a short last one of an epoch, and those that are announced
        needed = sum(sizes[-3 * window :]) + max(shard.bytes for shard in self.manifest.split("val").shards)
        if needed > self.local_gigabytes * GIGABYTE:
            mixed = f"{window} shards" if self.shuffle_shards else "all shards"
            raise CacheError(
                f"tokens.local_gigabytes={self.local_gigabytes:g}, but samples are drawn from {mixed} at a time "
                f"(prior_training.shuffle_shards={self.shuffle_shards}), which takes {needed / GIGABYTE:.3g} GB; set "
                f"prior_training.shuffle_shards to 1 or a few, or tokens.local_gigabytes to that"
            )

    def cut_and_note(self, max_length: int, annotate: Callable[[Tokens], Tensor]) -> None:
        """Cut streams to ``max_length`` elements, and add the notes of a grammar to each batch, in the loader."""
        self._finish = CutAndNote(max_length, annotate)

    def lengths_report(self) -> str:
        """How long the training streams are, and how many of them are cut."""
        reader = self.reader("train")
        if isinstance(reader, StreamedReader):
            return f"{self.tokens_path}: streamed, so lengths are not known before they come"
        lengths = reader.lengths
        report = f"{self.tokens_path}: {lengths.mean():.1f} elements on average, {lengths.max(initial=0)} at most"
        if self._finish is None:
            return report
        most = self._finish.max_length
        cut = int((lengths > most).sum())
        share = cut / max(1, len(lengths))
        return f"{report}; {cut} of {len(lengths)} ({share:.2%}) are longer than prior.max_length={most} and cut"

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
        """The first ``validation_samples`` of the val split, as many batches on every rank."""
        reader = self.reader("val")
        rank, world_size = self._place()
        tokens = ValidationTokens(
            reader, self.batch_size, self.validation_samples, rank, world_size, self.with_text, self._finish
        )
        return self._loader(tokens, batch_size=None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Embeddings want int64 and projections float32; the copy to the device does with less."""
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
            # Workers' seeds from a generator of its own: reading must not move torch's random numbers (exact resume).
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )
