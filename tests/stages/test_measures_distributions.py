"""Distances of features: known values, sensitivity and invariance, and torch-fidelity as the reference."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from stages.measures.backbones import BackboneError
from stages.measures.frechet import FRECHET_MINIMUM, fit_gaussian, frechet, measure_frechet
from stages.measures.inception import Inception
from stages.measures.kernel import kernel_distance
from stages.measures.neighbours import coverage, manifolds
from stages.measures.samples import Space


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def modes(count: int, seed: int, kept: int = 4) -> Tensor:
    """Points from the first ``kept`` of four distant modes in 16 dimensions."""
    centres = normal(4, 16, 99) * 10
    return centres[torch.arange(count) % kept] + normal(count, 16, seed)


# ---------------------------------------------------------------------- reference


def correlated(count: int, width: int, seed: int, shift: float) -> Tensor:
    return normal(count, width, seed) @ normal(width, width, seed + 100) / width**0.5 + shift


@pytest.mark.parametrize("width", [8, 64])
def test_frechet_agrees_with_torch_fidelity(width: int) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    sides = correlated(500, width, 1, 0), correlated(400, width, 2, 0.3)
    statistics = [
        {"mu": fitted.mean.numpy(), "sigma": fitted.covariance.numpy()} for fitted in map(fit_gaussian, sides)
    ]
    (expected,) = fidelity.fid_statistics_to_metric(*statistics, verbose=False).values()
    assert frechet(*sides) == pytest.approx(expected, rel=1e-3)
    assert np.allclose(np.cov(sides[0].double().numpy(), rowvar=False), statistics[0]["sigma"])


def test_kernel_distance_agrees_with_torch_fidelity() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    sides = correlated(300, 32, 1, 0), correlated(250, 32, 2, 0.5)
    ours = kernel_distance(*sides, seed=3)
    assert ours.subset_size == 125
    theirs = fidelity.kid_features_to_metric(
        *(side.double() for side in sides), kid_subsets=200, kid_subset_size=125, verbose=False
    )
    mean, std = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    # random subsets differ: means agree within their standard errors, spreads roughly
    assert ours.mean == pytest.approx(mean, abs=4 * std / math.sqrt(100))
    assert ours.std == pytest.approx(std, rel=0.3)
    # a single subset of everything is not random, so it agrees exactly
    both = [torch.cat([side[:250], side[:250]]) for side in sides]
    whole = fidelity.kid_features_to_metric(
        *(side.double() for side in both), kid_subsets=1, kid_subset_size=500, verbose=False
    )
    assert float(poly_mmd(*(side.double() for side in both))) == pytest.approx(
        whole["kernel_inception_distance_mean"], rel=1e-3
    )


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = normal(400, 6, 1), 0.7 * normal(300, 6, 2) + 0.4
    precision, recall = fidelity.calculate_precision_recall_full(fake, real, neighborhood=3)
    found = manifolds(real, fake, 3)
    assert (found.precision, found.recall) == (pytest.approx(precision), pytest.approx(recall))


# ---------------------------------------------------------------------- known values


def test_kernel_distance_of_a_shift_is_its_expectation() -> None:
    """k(x, y) = (x·y / d + 1)^3 has a closed-form mean for Gaussians, from E s, E s² and E s³ of s = x·y."""
    width, shift = 4, 1.0
    real, judged = normal(800, width, 1), normal(800, width, 2) + shift
    m = width * shift**2
    # s = x·y: x, y ~ N(0, I): E s = 0, E s² = d, E s³ = 0
    same = 1 + 3 * width / width**2
    # x ~ N(0, I), y ~ N(c, I): E s = 0, E s² = d + |c|², E s³ = 0
    mixed = 1 + 3 * (width + m) / width**2
    # both about c: E s = m, Var s = d + 2 m, third central moment 6 m
    mean, variance, third = m, width + 2 * m, 6 * m
    moments = mean, variance + mean**2, third + 3 * mean * variance + mean**3
    shifted = 1 + 3 * moments[0] / width + 3 * moments[1] / width**2 + moments[2] / width**3
    found = kernel_distance(real, judged, seed=0)
    assert found.mean == pytest.approx(same + shifted - 2 * mixed, rel=0.1)


def test_kernel_distance_is_unbiased_where_frechet_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.measures.kernel.NUM_SUBSETS", 20)
    few, many = ([(normal(n, 32, 2 * seed), normal(n, 32, 2 * seed + 1)) for seed in range(20)] for n in (40, 240))
    kernel = torch.tensor([[kernel_distance(*sides, seed=0).mean for sides in each] for each in (few, many)])
    error = kernel.std(1) / 20**0.5
    assert (kernel.mean(1).abs() < 3 * error).all() and error[0] > 3 * error[1]
    assert frechet(*few[0]) > 4 * frechet(*many[0]) > 1
    assert kernel_distance(normal(60, 4, 1), normal(60, 4, 2), 7) == kernel_distance(
        normal(60, 4, 1), normal(60, 4, 2), 7
    )
    with pytest.raises(ValueError, match="4 features"):
        kernel_distance(normal(3, 2, 1), normal(9, 2, 2), 0)


def test_copies_are_perfect_in_every_figure_and_far_ones_worthless() -> None:
    real = normal(300, 8, 1)
    assert manifolds(real, real, 5)[:2] == (1, 1)
    # every point is in its own neighborhood and on average in those of k others
    assert manifolds(real, real, 5).density == pytest.approx(1.2)
    assert manifolds(real, real + 100, 5) == (0, 0, 0)


def test_density_of_one_distribution_is_one() -> None:
    """Naeem et al. 2020, lemma 1: the expected density is 1 for any distribution."""
    found = [manifolds(normal(500, 4, 2 * seed), normal(500, 4, 2 * seed + 1), 5).density for seed in range(4)]
    assert sum(found) / 4 == pytest.approx(1, abs=0.06)


def test_lost_modes_lower_recall_and_coverage_alone_and_noise_precision_alone() -> None:
    real, good = modes(400, 1), modes(400, 2)
    full = manifolds(real, good, 5)
    dropped = manifolds(real, modes(400, 3, kept=2), 5)
    assert full.precision > 0.85 and full.recall > 0.85
    assert dropped.precision > 0.85 and dropped.recall <= 0.5
    assert coverage(real, modes(400, 3, kept=2), 5) <= 0.5 < coverage(real, good, 5)
    # half of the samples are far away: precision falls by half
    strays = torch.cat([good[:200], normal(200, 16, 4) + 200 * normal(200, 16, 5)])
    noisy = manifolds(real, strays, 5)
    assert noisy.precision == pytest.approx(full.precision / 2, abs=0.05)
    # one real outlier with a large ball raises the precision of strays, but hardly their density
    outlier = torch.cat([real, torch.full((1, 16), 60.0)])
    fooled = manifolds(outlier, strays * 0 + 55, 5)
    assert fooled.precision == 1 and fooled.density == pytest.approx(1 / 5)


def test_neighbourhoods_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = modes(90, 1), modes(70, 2, kept=3)
    whole = manifolds(real, fake, 3)
    monkeypatch.setattr("stages.measures.neighbours.CHUNK", 7)
    assert manifolds(real, fake, 3) == whole


# ---------------------------------------------------------------------- reported entries


def test_few_images_are_named_with_their_number() -> None:
    few, many = normal(500, 4, 1), normal(FRECHET_MINIMUM, 4, 2)
    found = measure_frechet(many, few, "these", False)
    assert found["bias"] == "N = 500 < 2,048: biased; compare only at equal N" and found["too_few_images"]
    assert measure_frechet(many, many, "these", False)["bias"] is None


def test_a_space_marks_its_backbone_and_puts_real_images_beside() -> None:
    held_out, real = modes(200, 1), modes(200, 2)
    space = Space("lite0", lambda pixels: pixels, held_out, real, same_backbone_as_loss=True)
    good, bad = (space.measure(drawn, 5, 0) for drawn in (modes(200, 3), modes(200, 3, kept=1)))
    assert all(found["same_backbone_as_loss"] for found in good.values())
    assert set(good) == {"fd_lite0", "fd_lite0_of_real_images", "kd_lite0", "manifold_lite0", "coverage_lite0"}
    real_ones = good["manifold_lite0"]["baseline_of_real_images"]
    assert real_ones == manifolds(held_out, real, 5)._asdict() and real_ones["recall"] > 0.85
    for key, entry in (("fd_lite0", "value"), ("kd_lite0", "mean")):
        assert bad[key][entry] > 10 * abs(good[key][entry])
    few = space.measure(held_out[:3], 5, 0)
    assert set(few) == {"fd_lite0", "fd_lite0_of_real_images"}
    fid = Space("inception", lambda pixels: pixels, held_out, real, False).measure(real, 5, 0)
    assert fid["fid"]["value"] == fid["fid_of_real_images"]["value"]


# ---------------------------------------------------------------------- Inception


def test_a_file_without_inceptions_weights_is_named(tmp_path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(BackboneError, match=r"weights.pth holds no weights of Inception"):
        Inception(tmp_path / "weights.pth", torch.device("cpu"))


def test_missing_torch_fidelity_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(BackboneError, match="pip install torch-fidelity"):
        Inception("weights.pth", torch.device("cpu"))
