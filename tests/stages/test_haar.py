"""Haar wavelets: equal to PyWavelets, exactly invertible, differentiable."""

import numpy as np
import pytest
import pywt
import torch
from torch.nn import functional

from stages.spectral.haar import haar_dwt, haar_idwt
from stages.spectral.patches import from_patches, to_patches

SIZES = [(64, 64, 3), (32, 16, 4), (33, 47, 3), (5, 7, 2), (1, 9, 1), (2, 2, 1)]


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize(("height", "width", "levels"), SIZES)
def test_equals_pywavelets_periodization(height, width, levels):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    bands = haar_dwt(x, levels)
    expected = pywt.wavedec2(x.numpy(), "haar", mode="periodization", level=levels, axes=(-2, -1))
    np.testing.assert_allclose(bands[0], expected[0], atol=1e-12)
    for ours, theirs in zip(bands[1:], expected[1:], strict=True):
        for index in range(3):
            np.testing.assert_allclose(ours[:, index], theirs[index], atol=1e-12)


@pytest.mark.parametrize("scaling", ["orthonormal", "averaging"])
@pytest.mark.parametrize(("height", "width", "levels"), SIZES)
def test_perfect_reconstruction(height, width, levels, scaling):
    x = torch.randn(2, 3, height, width)
    back = haar_idwt(haar_dwt(x, levels, scaling), scaling, (height, width))
    assert back.shape == x.shape
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)


def test_averaging_approximation_is_the_box_reduced_image():
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(haar_dwt(x, 3, "averaging")[0], functional.avg_pool2d(x, 8))


def test_orthonormal_keeps_energy():
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    energy = sum(band.square().sum() for band in haar_dwt(x, 4))
    torch.testing.assert_close(energy, x.square().sum())


def test_any_leading_dimensions():
    x = torch.randn(2, 5, 3, 8, 8)
    bands = haar_dwt(x, 2)
    assert bands[0].shape == (2, 5, 3, 2, 2) and bands[1].shape == (2, 5, 3, 3, 2, 2)
    torch.testing.assert_close(haar_idwt(bands), x, atol=1e-5, rtol=0)


def test_gradients():
    x = torch.randn(1, 1, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: haar_idwt([2 * b for b in haar_dwt(x, 2)], size=(6, 5)), x)


def test_halves_are_lifted():
    assert haar_dwt(torch.randn(1, 1, 4, 4, dtype=torch.bfloat16), 1)[0].dtype == torch.float32


@pytest.mark.parametrize("levels", [-1, 4])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        haar_dwt(torch.zeros(1, 1, 8, 8), levels)


def test_patches_round_trip_in_raster_order():
    band = torch.arange(2 * 4 * 6).float().reshape(1, 2, 4, 6)
    patches = to_patches(band, 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]
    assert torch.equal(from_patches(patches, 2, (2, 3)), band)
    with pytest.raises(ValueError, match="patches of 4"):
        to_patches(band, 4)
