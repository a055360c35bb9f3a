"""Inception features for FID, from a local weights file; nothing is downloaded.

The network is torch-fidelity's port of the TensorFlow model of 2015-12-05 that defines FID (Heusel et al. 2017),
including its resizing to 299 px.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.measures.backbones import BackboneError, as_rgb

NAME = "inception"


class Inception:
    """Frozen Inception network with its last pooled features.

    ``path`` is the state dict that torch-fidelity ships as ``pt_inception-2015-12-05-6726825d.pth``. Raises
    BackboneError if torch-fidelity is not installed or the file is invalid.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise BackboneError(
                "torch-fidelity is not installed; run `pip install torch-fidelity`, or remove eval.inception"
            ) from error
        try:
            # torch-fidelity unpickles any file; this check stops files that hold more than tensors
            torch.load(path, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(NAME, ["2048"], feature_extractor_weights_path=str(path))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackboneError(
                f"eval.inception={path} holds no weights of Inception ({reason}); give the file that torch-fidelity "
                "ships, pt_inception-2015-12-05-6726825d.pth"
            ) from error
        self.network = network.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: Tensor, size: int = 64) -> Tensor:
        """Features float32 [N, 2048] of uint8 images [N, 1 or 3, H, W]."""
        return torch.cat([self.network(as_rgb(part).to(self.device))[0].cpu() for part in pixels.split(size)])
