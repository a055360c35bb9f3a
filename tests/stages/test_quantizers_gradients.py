"""Gradients at the encoder: straight-through and the rotation trick, checked against explicit matrices."""

import math

import pytest
import torch
from torch.nn import functional

from stages.factory import build_quantizer
from stages.tokenizer.quantizers import (
    BSQConfig,
    CosineVQConfig,
    FSQConfig,
    LFQConfig,
    ResidualVQConfig,
    SimVQConfig,
)
from stages.tokenizer.quantizers.gradients import rotation, straight_through


def pairs(dim=6, count=50):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(3))


def backward(function, encodings, chosen, gradient):
    """(value, gradient at the encodings) of a function, given the ``gradient`` at its value."""
    encodings = encodings.clone().requires_grad_()
    value = function(encodings, chosen)
    return value.detach(), torch.autograd.grad(value, encodings, gradient)[0]


def plane_rotation(a, b):
    """Matrix that rotates the direction of a to that of b, from the angle and an orthonormal basis of the plane."""
    u = a / a.norm()
    v = b - (b @ u) * u
    v = v / v.norm()
    angle = math.acos(float((a @ b) / (a.norm() * b.norm())))
    plane = torch.stack([u, v], dim=1)
    turn = a.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return torch.eye(len(a), dtype=a.dtype) - plane @ plane.T + plane @ turn @ plane.T


def test_rotation_is_the_matrix_that_turns_and_scales_an_encoding_into_its_code():
    encodings, chosen, gradient = pairs()
    value, found = backward(rotation, encodings, chosen, gradient)
    torch.testing.assert_close(value, chosen)
    for e, q, g, mine in zip(encodings, chosen, gradient, found, strict=True):
        matrix = plane_rotation(e, q)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(e), dtype=e.dtype))
        scale = q.norm() / e.norm()
        torch.testing.assert_close(scale * matrix @ e, q)
        torch.testing.assert_close(mine, scale * matrix.T @ g)


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    encodings, chosen, gradient = pairs()
    _, found = backward(rotation, encodings, chosen, gradient)
    torch.testing.assert_close(
        functional.cosine_similarity(found, encodings, dim=-1), functional.cosine_similarity(gradient, chosen, dim=-1)
    )
    _, plain = backward(straight_through, encodings, chosen, gradient)
    changed = functional.cosine_similarity(plain, encodings) - functional.cosine_similarity(gradient, chosen)
    assert changed.abs().max() > 0.5


def test_straight_through_passes_the_gradient_as_it_is():
    encodings, chosen, gradient = pairs()
    value, found = backward(straight_through, encodings, chosen, gradient)
    torch.testing.assert_close(value, chosen)
    assert torch.equal(found, gradient)


@pytest.mark.parametrize("function", [straight_through, rotation])
def test_no_gradient_reaches_the_codes(function):
    encodings, chosen, _ = pairs()
    encodings.requires_grad_()
    chosen.requires_grad_()
    function(encodings, chosen).sum().backward()
    assert chosen.grad is None and encodings.grad is not None


def test_rotation_is_finite_for_opposite_and_equal_vectors():
    one = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 1e-20]])
    for other in (one, -one):
        value, found = backward(rotation, one, other, torch.ones_like(one))
        assert torch.isfinite(value).all() and torch.isfinite(found).all()
        torch.testing.assert_close(value[:2], other[:2])


@pytest.mark.parametrize("length", [0, 1e-20, 1e-9, 1e-5, 1e-2, 1])
def test_rotation_of_an_encoding_near_zero_gives_the_code_and_a_bounded_gradient(length):
    generator = torch.Generator().manual_seed(0)
    directions, chosen, gradient = (
        functional.normalize(torch.randn(50, 6, generator=generator), dim=-1) for _ in range(3)
    )
    value, found = backward(rotation, length * directions, chosen, gradient)
    assert torch.equal(value, chosen)
    if length < 1e-3:  # no direction to rotate
        assert torch.equal(found, gradient)
    else:
        torch.testing.assert_close(found.norm(dim=-1), torch.full((50,), 1 / length))


def bounded(quantizer, features):
    """The encodings before rounding, in units of the codes."""
    encodings = quantizer.encodings(features)
    kind = quantizer.config.kind if hasattr(quantizer, "config") else "fsq"
    if kind == "fsq":
        return encodings / (quantizer.levels // 2)
    return encodings / quantizer.config.bits**0.5 if kind == "bsq" else encodings


@pytest.mark.parametrize(
    "config",
    [
        FSQConfig(levels=[8, 5, 5]),
        LFQConfig(bits=6),
        BSQConfig(bits=6),
        CosineVQConfig(codes=20, code_dim=6),
        SimVQConfig(codes=20, code_dim=6),
        ResidualVQConfig(codes=20, code_dim=6, depth=3),
    ],
    ids=lambda config: config.kind,
)
def test_the_encoder_is_told_what_it_would_be_told_without_the_rounding(config):
    """Compared numerically: the decoder's gradient at the code times finite differences of the encodings."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config, 5, 7).eval()
    features = torch.randn(2, 3, 5, requires_grad=True)
    upstream = torch.randn(2, 3, 7)
    (quantizer(features).features * upstream).sum().backward()
    at_code = upstream @ quantizer.project_out.weight
    step = 1e-2
    for index in range(5):
        moved = torch.zeros(5)
        moved[index] = step
        with torch.no_grad():
            slope = (bounded(quantizer, features + moved) - bounded(quantizer, features - moved)) / (2 * step)
        torch.testing.assert_close(features.grad[..., index], (at_code * slope).sum(-1), atol=2e-3, rtol=2e-3)


def test_residual_quantisation_passes_the_rotation_once_from_the_sum_of_its_codes():
    torch.manual_seed(0)
    quantizer = build_quantizer(ResidualVQConfig(codes=20, code_dim=6, depth=3, gradient="rotation"), 6, 6).eval()
    quantizer.project_in = quantizer.project_out = torch.nn.Identity()
    features, upstream = torch.randn(1, 30, 6, requires_grad=True), torch.randn(1, 30, 6)
    result = quantizer(features)
    (result.features * upstream).sum().backward()
    codes = quantizer.codes(result.ids)
    for e, q, g, mine in zip(features[0].detach(), codes[0].detach(), upstream[0], features.grad[0], strict=True):
        wanted = q.norm() / e.norm() * plane_rotation(e, q).T @ g
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
