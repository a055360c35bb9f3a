"""Small DCT list codecs, images and priors for tests."""

import torch

from stages.codecs.sparse_dct import SparseDCTCodec, SparseDCTConfig
from stages.conditions.labels import ClassConditionConfig
from stages.factory import build_prior
from stages.prior.chunked import ChunkedPriorConfig


def codec(size=(16, 16), channels=3, **keys):
    return SparseDCTCodec(SparseDCTConfig(**{"quality": 50, **keys}), size, channels)


def noise(count=4, size=(16, 16), channels=3, seed=0):
    """Images in [-1, 1] with increasing noise, from plain gray to the full range."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    whole = (strength * 255 * (torch.rand(count, channels, *size, generator=generator) - 0.5)).round()
    return (whole + 128) / 127.5 - 1


def chunked(layout, seed=0, classes=("a", "b"), **keys):
    """A small prior with large weights and gates, so that every element matters."""
    torch.manual_seed(seed)
    sizes = {"width": 32, "heads": 4, "encoder_depth": 1, "channel_depth": 2, "position_depth": 1, "value_depth": 2}
    config = ChunkedPriorConfig(**{**sizes, "dropout": 0.0, "chunk": 7, "overlap": 3, **keys})
    built = build_prior(config, ClassConditionConfig(), layout, list(classes))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built.eval()
