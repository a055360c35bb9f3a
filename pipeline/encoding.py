"""Encoding of images into token shards: how blocks and batches are cut, and the predict loop that writes them.

Notes:

- Order, blocks and batches of a split depend only on its length and the config, never on the number of processes.
- Batches do not cross blocks and the last one is padded, so an image is always encoded together with the same images.
  The same holds for captions, which are encoded block by block.
- Lightning's sampler would interleave samples, and Lightning fails if a rank has no batch. So the missing shards are
  distributed here, and a rank without shards gets an empty batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import InputError
from data.images.reading import read_eval
from data.images.source import ImageSource
from data.images.views import to_float
from data.layout import Tokens
from data.stream import as_it_is, heed_parent_only
from data.tokens import order
from data.tokens.shards import Block, ShardWriter, finished_shard, total_remarks
from pipeline.config import Config
from pipeline.placement import image_loaders
from pipeline.processes import Preempted, defer_sigterm, sigterm_received
from stages.conditions.encoders import TextEncoder
from stages.contract import RefusedImage, Tokenizer


@dataclass(frozen=True)
class Piece:
    """The part of a block that is encoded as one batch."""

    split: str
    shard: int
    block: int
    indices: np.ndarray
    """int64 [n]: indices of the images in the source."""
    ends_block: bool
    ends_shard: bool


class SplitPlan:
    """Division of one split into blocks and shards, and its order."""

    def __init__(self, name: str, source: ImageSource, folder: Path, config: Config) -> None:
        self.name, self.source, self.folder = name, source, folder
        self.block_size = order.block_size(len(source))
        self.blocks_per_shard = config.tokens.blocks_per_shard
        # A batch larger than a block would be mostly padding.
        self.batch_size = min(config.tokens.encode_batch_size, self.block_size)
        self.order = order.source_order(len(source), config.tokens.permutation_seed)

    @property
    def num_shards(self) -> int:
        """Number of shards of the whole split."""
        return -(-len(self.order) // (self.block_size * self.blocks_per_shard))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not finished on disk."""
        return [number for number in range(self.num_shards) if finished_shard(self.folder, number) is None]

    def pieces(self, shard: int) -> list[Piece]:
        """The batches of a shard, in order."""
        pieces = []
        first = shard * self.blocks_per_shard
        last = min(first + self.blocks_per_shard, -(-len(self.order) // self.block_size)) - 1
        for block in range(first, last + 1):
            indices = self.order[block * self.block_size : (block + 1) * self.block_size]
            for start in range(0, len(indices), self.batch_size):
                ends_block = start + self.batch_size >= len(indices)
                part = indices[start : start + self.batch_size]
                pieces.append(Piece(self.name, shard, block, part, ends_block, ends_block and block == last))
        return pieces


class PieceImages(Dataset[dict[str, Any]]):
    """Pixels and labels of each piece; a single empty batch if there are no pieces."""

    def __init__(self, pieces: list[Piece], plans: Mapping[str, SplitPlan], config: Config) -> None:
        self.pieces, self.plans, self.config = pieces, plans, config.images

    def __len__(self) -> int:
        return max(1, len(self.pieces))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Pixels uint8 [batch, C, H, W], padded with black, and lists for the n <= batch readable images.

        Raises CorruptImage unless ``images.skip_corrupt``.
        """
        if not self.pieces:
            return {}
        piece = self.pieces[number]
        plan = self.plans[piece.split]
        shape = (plan.batch_size, self.config.channels, self.config.size, self.config.size)
        batch: dict[str, Any] = {name: [] for name in ("indices", "labels", "keys", "texts", "skipped")}
        batch |= {"piece": number, "pixels": torch.zeros(shape, dtype=torch.uint8)}
        for index in piece.indices.tolist():
            view = read_eval(plan.source, index, self.config)
            if not view.readable:
                batch["skipped"].append(view.key)
                continue
            batch["pixels"][len(batch["keys"])] = view.pixels
            batch["indices"].append(index)
            batch["labels"].append(view.label)
            batch["keys"].append(view.key)
            batch["texts"].append(view.text)
        return batch


class Encoding(L.LightningModule):
    """Encodes and writes this rank's share of the missing shards."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder | None,
        plans: Mapping[str, SplitPlan],
        missing: list[tuple[str, int]],
        config: Config,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._plans, self._missing, self._config = plans, missing, config
        self._pieces: list[Piece] = []
        self._parts: list[dict[str, Any]] = []
        self._skipped: list[str] = []
        self._writer: ShardWriter | None = None

    def setup(self, stage: str) -> None:
        """Distribute the shards that were missing on the first rank; by now, another rank may see fewer."""
        missing = self.trainer.strategy.broadcast(self._missing)
        own_shards = missing[self.global_rank :: self.trainer.world_size]
        self._pieces = [piece for split, shard in own_shards for piece in self._plans[split].pieces(shard)]

    def on_predict_start(self) -> None:
        """Move the text encoder to the device of this rank. From now on, SIGTERM is checked between pieces."""
        defer_sigterm()
        if self._text_encoder is not None:
            self._text_encoder.to(self.device)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The pieces of this rank in order, one per batch."""
        images = PieceImages(self._pieces, self._plans, self._config)
        return DataLoader(
            images,
            batch_size=None,
            num_workers=image_loaders(self._config),
            collate_fn=as_it_is,
            worker_init_fn=heed_parent_only,
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Encode a piece in every view; write its block and commit its shard once complete. Returns the image count."""
        if sigterm_received():
            raise Preempted("SIGTERM: the finished shards stay")
        if not batch:
            return 0
        piece = self._pieces[batch["piece"]]
        pixels = to_float(batch["pixels"])
        views = [pixels, pixels.flip(-1)] if self._config.images.flip else [pixels]
        count = len(batch["keys"])
        try:
            tokens = [self.tokenizer.encode(view)[:count] for view in views]
        except RefusedImage as refused:
            # rows after the images are black padding
            name = batch["keys"][refused.row] if refused.row < count else "(black padding)"
            raise InputError(f"the {piece.split} image {name}: {refused.reason}") from refused
        self._parts.append({**batch, **stack_views(tokens)})
        self._skipped += batch["skipped"]
        if self._writer is None:
            plan = self._plans[piece.split]
            self._writer = ShardWriter(plan.folder, piece.shard, self.tokenizer.layout)
        if piece.ends_block:
            block = join_parts(piece.block, self._parts)
            if self._text_encoder is not None:
                add_captions(block, self._text_encoder)
            self._writer.write(block)
            self._parts = []
        if piece.ends_shard:
            self._writer.commit(self._skipped)
            self._writer, self._skipped = None, []
        return count

    def on_predict_end(self) -> None:
        """Wait for the other ranks: the manifest is written after the last shard."""
        self.trainer.strategy.barrier("token shards")

    def abort(self) -> None:
        """Remove a partly written shard, if there is one."""
        if self._writer is not None:
            self._writer.abort()


def stack_views(views: list[Tokens]) -> dict[str, Any]:
    """Stack Tokens of all views, padded to the longest: ids [n, V, L, F], lengths [n, V], header [n, V, S], remarks."""
    longest = max(view.ids.shape[1] for view in views)
    return {
        "ids": np.stack([_padded(_numpy(view.ids), 1, longest) for view in views], axis=1),
        "lengths": np.stack([_numpy(view.lengths) for view in views], axis=1),
        "header": np.stack([_numpy(view.header) for view in views], axis=1),
        # only of the images as they are: with mirrored ones, each image would count twice
        "remarks": {name: int(counts.sum()) for name, counts in (views[0].remarks or {}).items()},
    }


def join_parts(number: int, parts: list[dict[str, Any]]) -> Block:
    """Join pieces, in order, to a block."""
    longest = max(part["ids"].shape[2] for part in parts)
    return Block(
        number=number,
        ids=np.concatenate([_padded(part["ids"], 2, longest) for part in parts]),
        lengths=np.concatenate([part["lengths"] for part in parts]),
        header=np.concatenate([part["header"] for part in parts]),
        labels=np.asarray([label for part in parts for label in part["labels"]], dtype=np.int64),
        indices=np.asarray([index for part in parts for index in part["indices"]], dtype=np.int64),
        keys=[key for part in parts for key in part["keys"]],
        texts=[text for part in parts for text in part["texts"]],
        remarks=total_remarks(part["remarks"] for part in parts),
    )


def add_captions(block: Block, encoder: TextEncoder) -> None:
    """Encode the captions of a block and the empty caption. Samples without text get no states."""
    texts = [text for text in block.texts if text]
    (empty, *encoded), block.captions_cut = encoder.encode_counting(["", *texts])
    states = iter(encoded)
    block.captions = [empty, *(next(states) if text else empty[:0] for text in block.texts)]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    widths = [(0, length - array.shape[axis]) if at == axis else (0, 0) for at in range(array.ndim)]
    return np.pad(array, widths)
