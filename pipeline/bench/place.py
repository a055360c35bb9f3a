"""Shared parts of the benchmarks of one config: models with new weights, and a temporary folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from data.images.sources import open_source
from data.images.views import to_float
from data.layout import TokenLayout
from data.tokens.manifest import Manifest, SplitInfo
from data.tokens.shards import NO_LABEL, Block, ShardWriter
from pipeline.config import Config
from pipeline.evaluation_images import read_images
from pipeline.placement import device_of
from pipeline.train import fit_statistics
from stages.contract import Tokenizer
from stages.factory import build_tokenizer
from stages.precision import resolve
from stages.weights import load_tokenizer, save_tokenizer

RANDOM = {"train": 2048, "val": 16}
"""Number of samples in the cache that priors are trained on."""


@dataclass
class Place:
    """A config, the number of repeats, and a temporary folder. Speed does not depend on what was learned."""

    config: Config
    repeats: int
    folder: Path
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = device_of(self.config)
        sections: dict[str, Any] = {
            name: dataclasses.replace(getattr(self.config, name), path=str(self.folder / path))
            for name, path in (("tokenizer", "tokenizer.safetensors"), ("tokens", "tokens"))
        }
        for name in ("tokenizer_training", "tokens", "prior_training"):
            part = sections.get(name, getattr(self.config, name))
            sections[name] = dataclasses.replace(part, precision=resolve(part.precision, self.device))
        # other processes would use other temporary folders
        trainer = dataclasses.replace(self.config.trainer, progress=False, devices=1, num_nodes=1)
        self.config = dataclasses.replace(self.config, **sections, trainer=trainer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the config with new weights and measured statistics; it is also saved in the folder."""
        images = self.config.images
        L.seed_everything(self.config.seed, verbose=False)
        tokenizer = build_tokenizer(self.config.tokenizer, (images.size, images.size), images.channels)
        fit_statistics(self.config, tokenizer)
        save_tokenizer(Path(self.config.tokenizer.path), tokenizer, self.config.tokenizer)
        return load_tokenizer(self.config.tokenizer.path)[0].to(self.device)

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """``eval.num_images`` held-out images in batches of ``eval.batch_size``, float [B, C, H, W] in [-1, 1]."""
        source = open_source(self.config.images, "val")
        pixels = read_images(source, self.config.images, self.config.eval.num_images).pixels
        return [to_float(part).to(self.device) for part in pixels.split(self.config.eval.batch_size)]

    @cached_property
    def tokens(self) -> Path:
        """A cache of random tokens in the layout of the tokenizer: their values do not affect speed."""
        folder, layout = self.folder / "random", self.tokenizer.layout
        splits = {name: write_random(folder / name, layout, count) for name, count in RANDOM.items()}
        Manifest(
            tokenizer_sha256="",
            tokenizer_kind=self.config.tokenizer.kind,
            tokenizer_config={},
            layout=layout,
            image_size=layout.image_size,
            channels=self.config.images.channels,
            views=("identity",),
            permutation_seed=0,
            encode_batch_size=1,
            precision="32",
            class_names=(),
            splits=splits,
        ).save(folder)
        return folder


def write_random(folder: Path, layout: TokenLayout, count: int) -> SplitInfo:
    """Write one shard with one block of ``count`` random samples, for a layout of fixed length."""
    generator = np.random.default_rng(0)
    sizes = [[part.vocabulary_size for part in scale.fields] for scale in layout.scales for _ in range(scale.length)]
    ids = generator.integers(0, sizes, (count, 1, layout.length, layout.num_fields))
    lengths, header = np.full((count, 1), layout.length), np.zeros((count, 1, 0), np.int64)
    with ShardWriter(folder, 0, layout) as writer:
        names = [str(row) for row in range(count)]
        writer.write(Block(0, ids, lengths, header, np.full(count, NO_LABEL), np.arange(count), names))
        shard = writer.commit([])
    return SplitInfo(count, 0, 0, count, "", (shard,))
