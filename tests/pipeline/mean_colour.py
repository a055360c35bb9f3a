"""A toy tokenizer in one file: the mean colour of each quarter, in 16 steps. Nothing in it is learned."""

from dataclasses import dataclass

import torch

from data.layout import Field, Scale, TokenLayout, Tokens
from stages.contract import Tokenizer
from stages.tokenizer.config import TokenizerConfig


@dataclass
class MeanColourConfig(TokenizerConfig):
    """Mean colours."""

    kind: str = "mean-colour"
    steps: int = 16
    """Values of a colour channel."""


class MeanColour(Tokenizer):
    """Four tokens with one field for each channel."""

    def __init__(self, config, image_size, channels):
        super().__init__()
        self.config, self.channels = config, channels
        fields = tuple(Field(f"channel{index}", config.steps) for index in range(channels))
        self.layout = TokenLayout((Scale("quarters", 4, (2, 2), 0, fields, image_size),))
        self.register_buffer("brightest", torch.tensor(-1.0))

    def fit(self, batches):
        for pixels, _ in batches:
            self.brightest.copy_(torch.maximum(self.brightest, pixels.max()))

    def encode(self, pixels):
        means = torch.nn.functional.adaptive_avg_pool2d(pixels, 2)
        ids = ((means + 1) / 2 * (self.config.steps - 1)).round().long()
        return Tokens.fixed(ids.flatten(2).transpose(1, 2))

    def decode(self, tokens):
        means = tokens.ids.transpose(1, 2).unflatten(2, (2, 2)) / (self.config.steps - 1) * 2 - 1
        return torch.nn.functional.interpolate(means.float(), self.layout.image_size)
