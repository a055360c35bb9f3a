"""Coordinate networks: complex arithmetic on pairs, spectra within cones, atoms on edges, fits that improve."""

import math

import pytest
import torch

from data.images.views import to_float
from stages.inr import fit as fitting
from stages.inr.fit import coordinates, fit_variant, rendered
from stages.inr.networks import SIREN_FREQUENCY, Siren
from stages.inr.pairs import ComplexLinear, gabor, polynomial
from stages.inr.singularities import find_singularities
from stages.inr.split import (
    CARRIER,
    LOWEST,
    SINGULAR_SHARE,
    GaussianNetwork,
    ProgressiveAtoms,
    ProgressiveNetwork,
    highest_carrier,
    placed_anywhere,
    placed_on_singularities,
)
from stages.inr.variants import VARIANTS

LEAK = 1e-3
"""Tolerated share of energy outside the allowed region; the bound for one atom is 2.7e-4."""


def random_pair(*shape):
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def picture(height=16, width=16):
    """Smooth colors and one edge, uint8 [3, height, width]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return (255 * torch.stack((x, y, (x + y > 1).float()))).round().to(torch.uint8)


def step_edge(column=20, side=32):
    """float [3, side, side] in [-1, 1]: dark left of a column, bright from that column on."""
    return torch.where(torch.arange(side) < column, -0.5, 0.5).expand(3, side, side).contiguous()


@pytest.mark.parametrize("bias", [True, False])
def test_a_complex_layer_on_pairs_is_one_of_complex_numbers(bias):
    torch.manual_seed(0)
    layer = ComplexLinear(5, 4, bias).double()
    real, imaginary = random_pair(7, 5)
    expected = torch.complex(real, imaginary) @ torch.complex(*layer.weight).T
    if bias:
        expected = expected + torch.complex(*layer.bias)
    torch.testing.assert_close(torch.complex(*layer((real, imaginary))), expected)


def test_activations_on_pairs_are_those_of_complex_numbers():
    torch.manual_seed(0)
    pair = random_pair(100)
    z = torch.complex(*pair)
    torch.testing.assert_close(torch.complex(*gabor(pair, 5.0, 3.0)), (5j * z - (3 * z).abs().square()).exp())
    square = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(torch.complex(*polynomial(pair, square)), z + square * z * z)


def test_faint_envelopes_are_no_denormal_numbers():
    size, _ = gabor((torch.tensor([0.0, 100.0]), torch.zeros(2)), 20.0, 30.0)
    assert size[0] == 1 and torch.finfo(torch.float32).tiny < size[1].abs() < 1e-15


def test_siren_begins_as_in_its_paper():
    torch.manual_seed(0)
    network = Siren(64, 2, 3)
    assert 0.4 < network.first.weight.abs().max() <= 1 / 2
    for layer in (*network.hidden, network.last):
        bound = math.sqrt(6 / 64) / SIREN_FREQUENCY
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    # hidden layers keep the arcsine distribution of sines, with variance 1/2
    x = coordinates((32, 32))
    for layer in (network.first, *network.hidden):
        x = (SIREN_FREQUENCY * layer(x)).sin()
        assert 0.4 < x.var() < 0.6


@pytest.mark.parametrize(("hidden", "layers"), [(256, 2), (256, 1), (256, 4), (128, 3)])
def test_all_variants_have_about_as_many_parameters(hidden, layers):
    image = to_float(picture(32, 32))
    counts = {
        name: sum(parameter.numel() for parameter in variant.build(image, hidden, layers).parameters())
        for name, variant in VARIANTS.items()
    }
    assert max(counts.values()) < 1.1 * min(counts.values()), counts


def shaken_network(axis):
    """Wavelets of one cone with perturbed weights; unconstrained, many would leave the cone or have low frequencies."""
    torch.manual_seed(axis)
    atoms = ProgressiveAtoms(placed_anywhere(8, (10, 10)), axis)
    with torch.no_grad():
        atoms.weight.add_(torch.randn_like(atoms.weight))
    return ProgressiveNetwork(atoms, 6, 2, 1).double()


def spectrum(values, reach):
    """(share of energy [n, n] at each frequency (y, x), frequencies [n]) of values [n, n] over [-reach, reach)²."""
    window = torch.hann_window(len(values), dtype=torch.float64)
    energy = torch.fft.fft2(values * window * window[:, None]).abs().square()
    return energy / energy.sum(), 2 * math.pi * torch.fft.fftfreq(len(values), 2 * reach / len(values))


@pytest.mark.parametrize("axis", [0, 1])
def test_products_of_wavelets_stay_in_their_half_plane_and_above_their_factors(axis):
    network, reach, side = shaken_network(axis), 2.5, 384
    lines = (torch.arange(side, dtype=torch.float64) * 2 / side - 1) * reach
    y, x = torch.meshgrid(lines, lines, indexing="ij")
    with torch.no_grad():
        real, imaginary = network(torch.stack((x, y), dim=-1).reshape(-1, 2))
        first = network.atoms(torch.stack((x, y), dim=-1).reshape(-1, 2))[0].sum(dim=-1)
    share, frequencies = spectrum(torch.complex(real, imaginary).reshape(side, side), reach)
    backwards = frequencies < 0
    assert share[:, backwards].sum() < LEAK if axis == 0 else share[backwards].sum() < LEAK
    low = torch.hypot(frequencies[:, None], frequencies) < LOWEST / 2
    assert share[low].sum() < LEAK
    assert spectrum(real.reshape(side, side), reach)[0][low].sum() < LEAK
    # why the cone is needed: the square of real wavelets has much low-frequency energy
    assert spectrum(first.reshape(side, side).square(), reach)[0][low].sum() > 0.1


def test_gaussians_stay_below_the_wavelets():
    torch.manual_seed(0)
    network, reach, side = GaussianNetwork((16, 16), 1).double(), 3, 128
    with torch.no_grad():
        network.weight.mul_(5 * torch.rand_like(network.weight))
        network.last.bias.zero_()
        lines = (torch.arange(side, dtype=torch.float64) * 2 / side - 1) * reach
        y, x = torch.meshgrid(lines, lines, indexing="ij")
        share, frequencies = spectrum(network(torch.stack((x, y), dim=-1).reshape(-1, 2)).reshape(side, side), reach)
    assert share[torch.hypot(frequencies[:, None], frequencies) > LOWEST].sum() < 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_training_cannot_leave_the_cone(axis):
    carriers, across = shaken_network(axis).atoms.maps().detach().unbind(dim=1)
    assert (carriers[:, 0] >= carriers[:, 1].abs()).all()
    assert (CARRIER * carriers.norm(dim=-1) >= LOWEST - 1e-9).all()
    assert (across.norm(dim=-1) <= carriers.norm(dim=-1) + 1e-9).all()
    sums = (carriers[:, None] + carriers).square().sum(dim=-1)
    squares = carriers.square().sum(dim=-1)
    assert (sums >= squares[:, None] + squares - 1e-9).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_atoms_begin_where_and_as_they_are_placed(axis):
    torch.manual_seed(0)
    placement = placed_anywhere(20, (8, 32))
    assert (placement.places[:, 1].abs() <= 0.25).all() and (placement.places[:, 0].abs() <= 1).all()
    atoms = ProgressiveAtoms(placement, axis)
    real, imaginary = atoms(placement.places)
    torch.testing.assert_close(real.diagonal(), torch.ones(20), atol=1e-4, rtol=0)
    torch.testing.assert_close(imaginary.diagonal(), torch.zeros(20), atol=1e-3, rtol=0)
    torch.testing.assert_close(CARRIER * atoms.maps()[:, 0].norm(dim=-1), placement.carriers)
    assert (placement.carriers >= LOWEST).all() and (placement.carriers <= highest_carrier((8, 32))).all()


def test_singularities_of_an_edge_lie_on_it_and_point_across():
    found = find_singularities(step_edge())
    edge = 2 * 20 / 32 - 1
    pixels = 32 / 2 * (found.places[:, 0] - edge).abs()
    assert len(found.places) == 32 * len(found.scales.unique())
    assert (pixels <= 0.5 + 1e-4).all()
    torch.testing.assert_close(found.directions[:, 0].abs(), torch.ones(len(found.places)))
    turned = find_singularities(step_edge().transpose(1, 2).contiguous())
    assert ((turned.places[:, 1] - edge).abs() * 16 <= 0.5 + 1e-4).all()


def test_atoms_begin_on_edges_and_elsewhere():
    torch.manual_seed(0)
    placement = placed_on_singularities(step_edge(), 40, axis=0)
    near = (placement.places[:, 0] - (2 * 20 / 32 - 1)).abs() < 2 / 32
    count = round(SINGULAR_SHARE * 40)
    assert near[:count].all() and near[count:].sum() < 10
    assert placement.angles[:count].abs().max() < 1e-3
    # there is no edge in this direction
    across = placed_on_singularities(step_edge(), 40, axis=1)
    assert ((across.places[:, 0] - 0.25).abs() < 2 / 32).sum() < 10


@pytest.mark.parametrize("image", [torch.zeros(3, 16, 16), torch.rand(3, 1, 9), torch.rand(3, 2, 1)])
def test_images_with_few_or_no_singularities_have_all_their_atoms(image):
    for axis in (0, 1):
        placement = placed_on_singularities(image, 10, axis)
        assert len(placement.carriers) == len(placement.angles) == len(placement.places) == 10
        assert torch.cat([placement.carriers, placement.angles, placement.places.flatten()]).isfinite().all()


def test_coordinates_are_middles_of_pixels_and_keep_proportions():
    found = coordinates((2, 4))
    assert found[:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75] * 2
    assert found[:, 1].tolist() == [-0.25] * 4 + [0.25] * 4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gets_better_and_repeats_itself(name):
    settings = {"hidden": 64, "layers": 2, "seed": 3, "log_every": 25}
    found = fit_variant(name, picture(), steps=60, **settings)
    assert found.steps == [0, 25, 50, 60] and found.diverged is None
    assert found.psnr[-1] > found.psnr[0] + 4 and found.psnr[1] < found.psnr[-1]
    assert found.pixels.dtype == torch.uint8 and found.pixels.shape == (3, 16, 16)
    again = fit_variant(name, picture(), steps=60, **settings)
    assert again.psnr == found.psnr and torch.equal(again.pixels, found.pixels)
    assert fit_variant(name, picture(), steps=1, **(settings | {"seed": 4})).psnr[0] != found.psnr[0]


def test_large_images_are_fitted_by_random_pixels_and_rendered_in_parts(monkeypatch):
    whole = fit_variant("siren", picture(), 64, 1, steps=30)
    monkeypatch.setattr(fitting, "BATCH", 50)
    parts = fit_variant("siren", picture(), 64, 1, steps=30)
    assert parts.psnr[0] == whole.psnr[0] and parts.psnr[-1] != whole.psnr[-1]
    assert parts.psnr[-1] > parts.psnr[0] + 2
    network = VARIANTS["siren"].build(to_float(picture()), 32, 1)
    places = coordinates((16, 16))
    torch.testing.assert_close(rendered(network, places), network(places).detach())


def test_the_narrowest_and_the_deepest_split_networks_can_be_fitted():
    for hidden, layers in ((2, 3), (48, 5)):
        found = fit_variant("split", picture(), hidden, layers, steps=20)
        assert found.diverged is None and found.psnr[-1] > found.psnr[0]


@pytest.mark.parametrize("name", ["siren", "split"])
def test_a_network_that_diverges_stops(name):
    found = fit_variant(name, picture(), 16, 1, steps=50, learning_rate=1e30, log_every=10)
    assert found.diverged is not None and 0 < found.diverged < 50
    assert found.steps == [0] and math.isfinite(found.psnr[0])
