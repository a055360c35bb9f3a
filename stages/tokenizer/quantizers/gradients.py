"""How the gradient of a chosen code reaches the encoding that it was chosen for.

Both take encodings and the codes chosen for them, [..., D], and give the codes' values; the codes themselves are
trained by the codebook loss alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stages.tokenizer.parts import GRADIENT_NAMES

LARGEST_SCALE = 1e3
"""Rotation takes an encoding that is shorter than its code by more than this for one without a direction."""


def straight_through(encodings: Tensor, chosen: Tensor) -> Tensor:
    """The gradient as it is (VQ-VAE, arXiv 1711.00937): every encoding of a cell is moved alike."""
    return encodings + (chosen - encodings).detach()


def rotation(encodings: Tensor, chosen: Tensor) -> Tensor:
    """The gradient turned and scaled like the code into its encoding (the rotation trick, arXiv 2410.06424).

    q = λ R e with the rotation R in the plane of e and q, and λ = |q| / |e|, both taken as constants: the gradient is
    λ Rᵀ g, whose angle to e is that of g to q. Where λ is above ``LARGEST_SCALE`` the gradient passes as it is. The
    value is the code, bit for bit.
    """
    from_, to = (functional.normalize(each.detach(), dim=-1) for each in (encodings, chosen))
    middle = functional.normalize(from_ + to, dim=-1)
    # R = I - 2 m mᵀ + 2 q̂ êᵀ, never built
    turned = (
        encodings
        - 2 * middle * (middle * encodings).sum(-1, keepdim=True)
        + 2 * to * (from_ * encodings).sum(-1, keepdim=True)
    )
    lengths = [each.detach().norm(dim=-1, keepdim=True) for each in (chosen, encodings)]
    scale = lengths[0] / lengths[1].clamp_min(1e-12)
    passed = torch.where(scale > LARGEST_SCALE, encodings, turned * scale)
    return chosen.detach() + (passed - passed.detach())


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(GRADIENT_NAMES, (straight_through, rotation), strict=True)
)
