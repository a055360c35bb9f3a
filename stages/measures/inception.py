"""Inception's features for FID, from a file of weights that is given: nothing is downloaded.

The network is torch-fidelity's, the TensorFlow model of 2015-12-05 by which FID was defined (Heusel et al. 2017), with
its resizing to 299 px.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.measures.backbones import BackboneError, as_rgb

NAME = "inception"


class Inception:
    """The frozen network with its last pooled features. Raises BackboneError without torch-fidelity or for a bad file.

    ``path`` holds the state dict that torch-fidelity ships as ``pt_inception-2015-12-05-6726825d.pth``.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise BackboneError(
                "torch-fidelity is not installed; run `pip install torch-fidelity`, or leave eval.inception out"
            ) from error
        try:
            # torch-fidelity unpickles whatever the file holds; only one of bare tensors gets so far
            torch.load(path, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(NAME, ["2048"], feature_extractor_weights_path=str(path))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackboneError(f"eval.inception={path} holds no weights of Inception ({reason})") from error
        self.network = network.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: Tensor, size: int = 64) -> Tensor:
        """float32 [N, 2048] of uint8 images [N, 1 or 3, H, W]."""
        return torch.cat([self.network(as_rgb(part).to(self.device))[0].cpu() for part in pixels.split(size)])
