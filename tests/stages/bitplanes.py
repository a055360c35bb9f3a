"""Small bit-plane codecs and images for tests."""

import torch

from stages.codecs.bitplane import BitplaneCodec, BitplaneConfig

VARIANTS = ("blocks", "zerotree")


def codec(variant="blocks", side=16, channels=1, **named):
    named.setdefault("final_threshold", 0.0625)
    return BitplaneCodec(BitplaneConfig(variant=variant, **named), (side, side), channels)


def noise(count=4, side=16, channels=1, seed=0):
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def smooth(count=4, side=16, channels=1):
    y, x = torch.meshgrid(*[torch.linspace(0, 3, side)] * 2, indexing="ij")
    phase = torch.arange(count * channels).view(count, channels, 1, 1)
    return (127.5 * (1 + torch.sin(y * (1 + phase % 3) + x + phase))).round().to(torch.uint8)
