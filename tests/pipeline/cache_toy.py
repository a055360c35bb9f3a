"""A deterministic toy tokenizer, toy images, and the command that caches them (``python -m``, by the cache tests)."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.layout import Field, Scale, TokenLayout, Tokens
from stages import factory
from stages.contract import Tokenizer
from stages.tokenizer.config import TokenizerConfig
from stages.weights import save_tokenizer

SIZE, CLASSES = 16, 3


@dataclass
class ToyConfig(TokenizerConfig):
    """The toy has nothing to set."""


class Toy(Tokenizer):
    """4 x 4 average pooling of grey pixels, quantised to 8 bits. ``TOY_SECONDS`` slows every call down."""

    def __init__(self, config: ToyConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        grid = (image_size[0] // 4, image_size[1] // 4)
        scale = Scale("pooled", grid[0] * grid[1], grid, 0, (Field("code", 256),), image_size)
        self.layout, self.channels = TokenLayout((scale,)), channels
        self.offset = nn.Buffer(torch.zeros(()))

    def encode(self, pixels: Tensor) -> Tokens:
        time.sleep(float(os.environ.get("TOY_SECONDS", 0)))
        pooled = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4)
        return Tokens.fixed(((pooled + 1) * 127.5 + self.offset).round().clamp(0, 255).long().flatten(1)[..., None])

    def decode(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


def register() -> None:
    """Make ``tokenizer.kind=toy`` known."""
    factory.TOKENIZERS["toy"] = ("tests.pipeline.cache_toy:ToyConfig", "tests.pipeline.cache_toy:Toy")


def write_tokenizer(path: Path, offset: float = 0.0) -> None:
    """A toy tokenizer's file; another offset is another tokenizer."""
    toy = Toy(ToyConfig("toy"), (SIZE, SIZE), 3)
    toy.offset.fill_(offset)
    save_tokenizer(path, toy, ToyConfig("toy"))


def write_images(folder: Path, count: int) -> None:
    """``count`` random PNGs in class folders; the red channel's mean grows with the class."""
    generator = np.random.default_rng(0)
    for index in range(count):
        label = index % CLASSES
        low, high = 80 * label, 80 * label + 80
        path = folder / f"class{label}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(low, high, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


if __name__ == "__main__":
    from pipeline.cache import cache_tokens
    from pipeline.config import load_config

    torch.set_num_threads(1)
    register()
    cache_tokens(load_config(sys.argv[1], sys.argv[2:]))
