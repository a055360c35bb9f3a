"""Perceptual distances, used both as a loss of stage 1 and as a measure of the evaluation.

The networks are frozen and not part of any checkpoint. ``Guest`` keeps them out of the owner's ``state_dict()``,
``parameters()`` and DDP broadcasts, while ``.to(device)`` of the owner still moves them.
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
"""Smallest image side, in pixels, that Lite0's distance supports."""


class Guest(nn.Module):
    """Hold a frozen module that is not registered: it adds neither state_dict entries nor parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # a tuple, because nn.Module registers modules that are assigned directly
        self._guest = (module.requires_grad_(False).eval(),)

    @property
    def guest(self) -> nn.Module:
        """The frozen module."""
        return self._guest[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # every move (.to, .cuda, .cpu) of this module or its owner calls this method
        self.guest._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Lite0Perceptual(Guest):
    """Squared distance between unit-normalized EfficientNet-Lite0 features, summed over strides 2 … 32.

    This is LPIPS (Zhang et al. 2018, eq. 1) with all weights equal to one. Typical values: a 256-px photo scores about
    0.8 after JPEG 50 and about 2.3 after a Gaussian blur of sigma 2. Images are used at their own size. Strides whose
    map would be smaller than 2x2 are left out, so distances at 32 px are sums of four terms and are not comparable with
    those at 64 px and more.
    """

    name = "lite0"

    def __init__(self) -> None:
        super().__init__(Lite0Features())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance float32 [B] between two batches [B, 1 or 3, H, W] in [-1, 1]; only ``prediction`` gets gradients."""
        with torch.autocast(prediction.device.type, enabled=False):
            with torch.no_grad():
                target_maps = self.maps(target)
            distance = prediction.new_zeros(len(prediction), dtype=torch.float32)
            for a, b in zip(self.maps(prediction), target_maps, strict=True):
                # sum over channels, mean over positions
                distance = distance + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return distance

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, 112] of pixels [B, 1 or 3, H, W] in [-1, 1]; see ``Lite0Features.pooled``."""
        with torch.autocast(pixels.device.type, enabled=False):
            backbone = self.guest
            assert isinstance(backbone, Lite0Features)
            return backbone.pooled(pixels.float())

    def spatial(self, pixels: Tensor) -> Tensor:
        """Spatial features [B, 448] of pixels [B, 1 or 3, H, W] in [-1, 1]; see ``Lite0Features.spatial``."""
        with torch.autocast(pixels.device.type, enabled=False):
            backbone = self.guest
            assert isinstance(backbone, Lite0Features)
            return backbone.spatial(pixels.float())

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps of at least 2x2, normalized to unit length over channels. Raises ValueError under 4 px."""
        features = [maps for maps in self.guest(pixels.float()) if min(maps.shape[-2:]) >= 2]
        if not features:
            raise ValueError(f"images of {tuple(pixels.shape[-2:])} px; a perceptual distance needs at least 4 px")
        return [F.normalize(maps, dim=1, eps=1e-6) for maps in features]


class VGGPerceptual(Guest):
    """LPIPS (Zhang et al. 2018) with VGG-16, from torchmetrics; torchvision downloads VGG at first use.

    Raises BackboneError if the weights are not cached and cannot be downloaded.
    """

    name = "lpips-vgg"

    def __init__(self) -> None:
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            # use only the metric's network: the metric rejects predictions outside [-1, 1] and stores every score
            network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
        except (OSError, ImportError, RuntimeError) as error:
            raise BackboneError(
                f"lpips-vgg: VGG-16's weights cannot be loaded ({error}); torchvision downloads 528 MB once. "
                "Offline use lite0: `make install`, tokenizer_training.perceptual=lite0"
            ) from error
        super().__init__(network)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance float32 [B] between two batches [B, 1 or 3, H, W] in [-1, 1]; only ``prediction`` gets gradients."""
        with torch.autocast(prediction.device.type, enabled=False):
            return self.guest(as_rgb(prediction.float()), as_rgb(target.detach().float())).flatten()


def build_perceptual(name: str) -> Lite0Perceptual | VGGPerceptual | None:
    """Build a perceptual distance by name: lite0, lpips-vgg, or none (returns None).

    Raises ValueError for another name, and BackboneError if the weights are not available.
    """
    if name == "none":
        return None
    if name == "lite0":
        return Lite0Perceptual()
    if name == "lpips-vgg":
        return VGGPerceptual()
    raise ValueError(f"perceptual={name!r}; allowed: {', '.join(NAMES)}")
