"""Wavelets by name: equal to PyWavelets, exactly invertible, differentiable, approximation in the pixel range."""

import numpy as np
import pytest
import pywt
import torch

from stages.spectral.haar import haar_dwt
from stages.spectral.lifting import LIFTED
from stages.spectral.names import orthogonal_wavelets
from stages.spectral.wavelets import dwt, idwt

SIZES = [(64, 64, 3), (32, 16, 4), (33, 47, 3), (5, 7, 2), (1, 9, 1), (2, 2, 1)]
ORTHOGONAL = ("db2", "db4", "sym4", "coif1", "db10")
SYMMETRIC = tuple((name, "symmetric") for name in LIFTED)
EVERY = (("haar", None), *SYMMETRIC, *((name, "periodization") for name in (*LIFTED, *ORTHOGONAL)))
REACH = {"bior2.2": 2, "bior4.4": 4}
"""Samples that the low-pass filter covers on each side of its center."""


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize(("height", "width", "levels"), SIZES)
@pytest.mark.parametrize("wavelet", [*LIFTED, *ORTHOGONAL])
def test_equals_pywavelets_periodization(wavelet, height, width, levels):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    bands = dwt(x, levels, wavelet, boundary="periodization")
    expected = pywt.wavedec2(x.numpy(), wavelet, mode="periodization", level=levels, axes=(-2, -1))
    np.testing.assert_allclose(bands[0], expected[0], atol=1e-10)
    for ours, theirs in zip(bands[1:], expected[1:], strict=True):
        for index in range(3):
            np.testing.assert_allclose(ours[:, index], theirs[index], atol=1e-10)


@pytest.mark.parametrize("side", [8, 16, 34])
@pytest.mark.parametrize("wavelet", LIFTED)
def test_symmetric_borders_are_a_mirror_at_the_first_and_last_sample(wavelet, side):
    """PyWavelets' mode "reflect" has more coefficients than samples; ours are the inner ones."""
    x = torch.randn(1, 1, side, side, dtype=torch.float64)
    ours = dwt(x, 1, wavelet)
    low, details = pywt.dwt2(x.numpy(), wavelet, mode="reflect")
    first = REACH[wavelet] // 2
    inside = (..., slice(first, first + side // 2), slice(first, first + side // 2))
    np.testing.assert_allclose(ours[0], low[inside], atol=1e-10)
    for index in range(3):
        np.testing.assert_allclose(ours[1][:, index], details[index][inside], atol=1e-10)


@pytest.mark.parametrize("wavelet", LIFTED)
def test_borders_matter_only_at_the_borders(wavelet):
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    mirrored, around = dwt(x, 2, wavelet), dwt(x, 2, wavelet, boundary="periodization")
    for first, second in zip(mirrored, around, strict=True):
        torch.testing.assert_close(first[..., 3:-3, 3:-3], second[..., 3:-3, 3:-3], atol=1e-12, rtol=0)
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", ["orthonormal", "averaging"])
@pytest.mark.parametrize(("height", "width", "levels"), SIZES)
@pytest.mark.parametrize(("wavelet", "boundary"), EVERY)
def test_perfect_reconstruction(wavelet, boundary, height, width, levels, scaling, dtype):
    x = torch.randn(2, 3, height, width, dtype=dtype)
    bands = dwt(x, levels, wavelet, scaling, boundary)
    back = idwt(bands, wavelet, scaling, (height, width), boundary)
    assert back.shape == x.shape and back.dtype == dtype
    torch.testing.assert_close(back, x, atol=1e-5 if dtype == torch.float32 else 1e-11, rtol=0)
    if not (height % 2**levels or width % 2**levels):
        assert sum(band.numel() for band in bands) == x.numel()


def test_every_orthogonal_wavelet_is_inverted():
    x = torch.randn(1, 1, 16, 8, dtype=torch.float64)
    assert len(orthogonal_wavelets()) > 70 and "dmey" not in orthogonal_wavelets()
    for wavelet in orthogonal_wavelets():  # taps of long wavelets have ten digits
        torch.testing.assert_close(idwt(dwt(x, 2, wavelet), wavelet), x, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("wavelet", "boundary"), EVERY)
def test_a_constant_is_its_own_approximation_in_averaging_scale(wavelet, boundary):
    bands = dwt(torch.full((1, 2, 32, 32), 0.7, dtype=torch.float64), 3, wavelet, "averaging", boundary)
    torch.testing.assert_close(bands[0], torch.full((1, 2, 4, 4), 0.7, dtype=torch.float64), atol=1e-8, rtol=0)
    for details in bands[1:]:
        assert details.abs().max() < 1e-8


@pytest.mark.parametrize(("wavelet", "boundary"), EVERY)
def test_the_scalings_differ_by_a_power_of_two(wavelet, boundary):
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    one, other = (dwt(x, 3, wavelet, scaling, boundary) for scaling in ("orthonormal", "averaging"))
    for band, halved, level in zip(one, other, (3, 3, 2, 1), strict=True):
        torch.testing.assert_close(band, halved * 2.0**level)


@pytest.mark.parametrize("wavelet", ORTHOGONAL)
def test_orthogonal_wavelets_keep_energy(wavelet):
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(sum(band.square().sum() for band in dwt(x, 3, wavelet)), x.square().sum())


@pytest.mark.parametrize("wavelet", LIFTED)
def test_linear_images_have_no_details_inside(wavelet):
    """These wavelets have two or more vanishing moments; Haar has one."""
    x = torch.arange(32, dtype=torch.float64).expand(1, 1, 32, 32)
    assert dwt(x, 1, wavelet)[1][..., 2:-2, 2:-2].abs().max() < 1e-9
    assert dwt(x, 1, "haar")[1].abs().max() > 0.5


@pytest.mark.parametrize(("wavelet", "boundary"), [*SYMMETRIC, ("bior4.4", "periodization"), ("db2", None)])
def test_gradients(wavelet, boundary):
    x = torch.randn(1, 1, 6, 5, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        bands = dwt(x, 2, wavelet, boundary=boundary)
        return idwt([band * (2 + index) for index, band in enumerate(bands)], wavelet, size=(6, 5), boundary=boundary)

    assert torch.autograd.gradcheck(there_and_back, x)


@pytest.mark.parametrize("wavelet", ["bior4.4", "sym4"])
def test_any_leading_dimensions_and_halves(wavelet):
    x = torch.randn(2, 5, 3, 8, 8)
    bands = dwt(x, 2, wavelet)
    assert bands[0].shape == (2, 5, 3, 2, 2) and bands[1].shape == (2, 5, 3, 3, 2, 2)
    torch.testing.assert_close(bands[1][1, 4], dwt(x[1, 4], 2, wavelet)[1])
    assert dwt(x.bfloat16(), 1, wavelet)[0].dtype == torch.float32


def test_haar_is_the_fast_one():
    x = torch.randn(1, 3, 16, 16)
    for name in ("haar", "db1"):
        for ours, fast in zip(dwt(x, 2, name, "averaging"), haar_dwt(x, 2, "averaging"), strict=True):
            assert torch.equal(ours, fast)


def test_what_there_is_not_is_named():
    x = torch.zeros(1, 1, 8, 8)
    for name in ("bior3.3", "dmey", "mexh", "legall"):
        with pytest.raises(ValueError, match=rf"'{name}'; allowed: haar, bior2.2, bior4.4, or an orthogonal"):
            dwt(x, 1, name)
    with pytest.raises(ValueError, match=r"symmetric borders with the wavelet db2; only bior2.2, bior4.4"):
        dwt(x, 1, "db2", boundary="symmetric")
    with pytest.raises(ValueError, match="levels=5"):
        dwt(x, 5, "bior4.4")
