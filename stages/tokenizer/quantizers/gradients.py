"""Gradient estimators for quantization: how the gradient of a code reaches its encoding.

Both functions take encodings and their chosen codes, [..., D], and return the values of the codes. Only the codebook
loss trains the codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stages.tokenizer.parts import GRADIENT_NAMES

LARGEST_SCALE = 1e3
"""If a code is longer than its encoding by more than this factor, rotation treats the encoding as zero."""


def straight_through(encodings: Tensor, chosen: Tensor) -> Tensor:
    """Copy the gradient unchanged (VQ-VAE, arXiv 1711.00937). All encodings of a code are moved in the same way."""
    return encodings + (chosen - encodings).detach()


def rotation(encodings: Tensor, chosen: Tensor) -> Tensor:
    """Rotate and scale the gradient from the code to its encoding (the rotation trick, arXiv 2410.06424).

    q = λ R e with the rotation R in the plane of e and q, and λ = |q| / |e|, both treated as constants. The gradient is
    λ Rᵀ g, whose angle to e equals the angle of g to q. If λ is above ``LARGEST_SCALE``, the gradient is copied
    unchanged. The value is bitwise equal to the code.
    """
    from_, to = (functional.normalize(vectors.detach(), dim=-1) for vectors in (encodings, chosen))
    middle = functional.normalize(from_ + to, dim=-1)
    # apply R = I - 2 m mᵀ + 2 q̂ êᵀ without building the matrix
    rotated = (
        encodings
        - 2 * middle * (middle * encodings).sum(-1, keepdim=True)
        + 2 * to * (from_ * encodings).sum(-1, keepdim=True)
    )
    code_lengths, lengths = (vectors.detach().norm(dim=-1, keepdim=True) for vectors in (chosen, encodings))
    scale = code_lengths / lengths.clamp_min(1e-12)
    passed = torch.where(scale > LARGEST_SCALE, encodings, rotated * scale)
    return chosen.detach() + (passed - passed.detach())


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(GRADIENT_NAMES, (straight_through, rotation), strict=True)
)
