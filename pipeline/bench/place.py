"""What the benchmarks of one config share: its parts with fresh weights, and a folder that goes away."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import lightning as L
import torch

from data.images.sources import open_source
from data.images.views import to_float
from data.tokens.manifest import FILE
from pipeline.cache import cache_tokens
from pipeline.config import Config
from pipeline.evaluation_images import read_images
from pipeline.run import device_of
from pipeline.train import fit_statistics
from stages.contract import Tokenizer
from stages.factory import build_tokenizer
from stages.weights import load_tokenizer, save_tokenizer


@dataclass
class Place:
    """A config, how often to measure, and a temporary folder. What is slow does not depend on what was learned."""

    config: Config
    repeats: int
    folder: Path
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = device_of(self.config)
        sections = {
            name: dataclasses.replace(getattr(self.config, name), path=str(self.folder / path))
            for name, path in (("tokenizer", "tokenizer.safetensors"), ("tokens", "tokens"))
        }
        trainer = dataclasses.replace(self.config.trainer, progress=False)
        self.config = dataclasses.replace(self.config, **sections, trainer=trainer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The config's tokenizer with fresh weights and measured statistics, also in the folder."""
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
        """A token cache of the config's images by ``tokenizer``."""
        assert self.tokenizer is not None
        if not (Path(self.config.tokens.path) / FILE).exists():
            cache_tokens(self.config)
        return Path(self.config.tokens.path)
