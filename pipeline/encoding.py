"""The encoding of images into shards: what belongs into which block, and the predict loop that fills them.

What is notable here:

- a split's order, blocks and encode batches follow from its length and the config alone, never from the processes;
- encode batches are cut inside a block and the last one is padded, so an image is always encoded in the same company;
  so is a caption, whose company is its block;
- Lightning's own sampler would interleave samples, and Lightning fails when a rank has no batch: the missing shards are
  dealt out here, and a rank without one gets an empty batch.
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
    """One encode batch's share of a block."""

    split: str
    shard: int
    block: int
    indices: np.ndarray
    """int64 [n]: the images, as indices of the source."""
    ends_block: bool
    ends_shard: bool


class SplitPlan:
    """How one split is laid out: order, blocks, shards."""

    def __init__(self, name: str, source: ImageSource, folder: Path, config: Config) -> None:
        self.name, self.source, self.folder = name, source, folder
        self.block_size = order.block_size(len(source))
        self.blocks_per_shard = config.tokens.blocks_per_shard
        # A batch larger than a block would be padding for the greater part.
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
        """The encode batches of a shard, in order."""
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
    """Pixels and labels of each piece; an empty batch where there is none."""

    def __init__(self, pieces: list[Piece], plans: Mapping[str, SplitPlan], config: Config) -> None:
        self.pieces, self.plans, self.config = pieces, plans, config.images

    def __len__(self) -> int:
        return max(1, len(self.pieces))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """pixels uint8 [batch, C, H, W], padded with black, and lists for the n <= batch readable images.

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
    """Encodes this rank's share of the missing shards and writes them."""

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
        """Deal out the shards, as the first rank saw them: another one may already have written some by now."""
        missing = self.trainer.strategy.broadcast(self._missing)
        mine = missing[self.global_rank :: self.trainer.world_size]
        self._pieces = [piece for split, shard in mine for piece in self._plans[split].pieces(shard)]

    def on_predict_start(self) -> None:
        """Captions are encoded on this rank's device; SIGTERM is asked for between pieces."""
        defer_sigterm()
        if self._text_encoder is not None:
            self._text_encoder.to(self.device)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's pieces in order; a batch of the loader is a piece."""
        images = PieceImages(self._pieces, self._plans, self._config)
        return DataLoader(
            images,
            batch_size=None,
            num_workers=image_loaders(self._config),
            collate_fn=as_it_is,
            worker_init_fn=heed_parent_only,
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Encode a piece in every view; write the block, and commit the shard, that it ends. Returns the images."""
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
            # rows behind the images are black
            name = batch["keys"][refused.row] if refused.row < count else "without anything on it"
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
        """Wait for the other ranks: the manifest comes after the last shard."""
        self.trainer.strategy.barrier("token shards")

    def abort(self) -> None:
        """Leave no half-written file behind; nothing happens where all is written."""
        if self._writer is not None:
            self._writer.abort()


def stack_views(views: list[Tokens]) -> dict[str, Any]:
    """ids [n, V, L, F], lengths [n, V], header [n, V, S] and remarks of one Tokens a view, padded to the longest."""
    longest = max(view.ids.shape[1] for view in views)
    return {
        "ids": np.stack([_padded(_numpy(view.ids), 1, longest) for view in views], axis=1),
        "lengths": np.stack([_numpy(view.lengths) for view in views], axis=1),
        "header": np.stack([_numpy(view.header) for view in views], axis=1),
        # of the images as they are: mirrored, each would count twice
        "remarks": {name: int(counts.sum()) for name, counts in (views[0].remarks or {}).items()},
    }


def join_parts(number: int, parts: list[dict[str, Any]]) -> Block:
    """The block of some pieces, in their order."""
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
    """Encode a block's texts and the empty caption. A sample without text has no states of its own."""
    texts = [text for text in block.texts if text]
    (empty, *encoded), block.captions_cut = encoder.encode_counting(["", *texts])
    states = iter(encoded)
    block.captions = [empty, *(next(states) if text else empty[:0] for text in block.texts)]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    widths = [(0, length - array.shape[axis]) if at == axis else (0, 0) for at in range(array.ndim)]
    return np.pad(array, widths)
