"""Properties of the measures: known values and plausible behavior."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.layout import Field, Scale, TokenLayout, Tokens
from stages.measures.classifier import accuracy, thumbnails, train_classifier
from stages.measures.codes import code_use, joint_use, perplexity
from stages.measures.distortion import HIGHEST_PSNR, psnr, ssim
from stages.measures.frechet import Gaussian, fit_gaussian, frechet, frechet_distance
from stages.measures.neighbours import coverage, memorised_share, nearest
from stages.measures.pictures import error_picture, sheet
from stages.measures.rate import rates, sums_of_scales


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- Fréchet


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    first = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), 100)
    second = Gaussian(torch.tensor([1.0, 2.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double(), 100)
    # |m|^2 + sum of (s1 - s2)^2
    assert frechet_distance(first, second) == pytest.approx(9 + 1 + 0 + 4, abs=1e-9)


def test_frechet_equals_the_general_square_root() -> None:
    a = torch.randn(400, 6, generator=generator(1)) @ torch.randn(6, 6, generator=generator(2))
    b = torch.randn(300, 6, generator=generator(3)) @ torch.randn(6, 6, generator=generator(4)) + 1
    first, second = fit_gaussian(a), fit_gaussian(b)
    torch.testing.assert_close(first.covariance, torch.cov(a.double().T))
    roots = torch.linalg.eigvals(first.covariance @ second.covariance).sqrt().real.sum()
    traces = first.covariance.trace() + second.covariance.trace()
    expected = (first.mean - second.mean).square().sum() + traces - 2 * roots
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)


def test_frechet_of_a_shifted_copy_is_the_squared_shift() -> None:
    features = torch.randn(200, 8, generator=generator())
    assert frechet(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet(features, features + 0.5) == pytest.approx(8 * 0.25, rel=1e-5)
    few = features[:4]  # a singular covariance
    assert frechet(few, few + 1) == pytest.approx(8, rel=1e-5)


def test_frechet_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        fit_gaussian(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="finite"):
        fit_gaussian(torch.full((3, 3), torch.nan))


# ---------------------------------------------------------------------- neighbors


def test_nearest_equals_brute_force_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.measures.neighbours.CHUNK", 7)
    queries, reference = torch.randn(20, 5, generator=generator()), torch.randn(50, 5, generator=generator(1))
    found = nearest(queries, reference, 3)
    distances, indices = torch.cdist(queries, reference).topk(3, largest=False)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.distances, distances)


def test_a_copy_has_distance_zero_even_in_bytes_far_from_the_origin() -> None:
    pixels = torch.randint(200, 256, (60, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    found = nearest(pixels[[5, 9]], pixels)
    assert found.indices[:, 0].tolist() == [5, 9] and found.distances.max() == 0
    with pytest.raises(ValueError, match="neighbors"):
        nearest(pixels, pixels[:2], 3)


def test_coverage_is_one_for_copies_and_falls_with_lost_modes() -> None:
    centres = torch.randn(4, 16, generator=generator()) * 10
    real, fake = (centres.repeat(50, 1) + torch.randn(200, 16, generator=generator(seed)) for seed in (1, 2))
    assert coverage(real, real, 5) == 1
    full, half = coverage(real, fake, 5), coverage(real, fake[torch.arange(200) % 4 < 2], 5)
    assert full > 0.85 and half <= 0.5
    assert coverage(real, fake + 100, 5) == 0


def test_memorised_share_of_copies_is_one_and_of_fresh_draws_the_percentile() -> None:
    train, test, fresh = (torch.randn(n, 4, generator=generator(n)) for n in (3000, 2000, 2001))
    assert memorised_share(train[:300], train, test).share == 1
    found = memorised_share(fresh, train, test, percentile=5)
    assert found.share == pytest.approx(0.05, abs=0.015)
    assert found.median_ratio == pytest.approx(1, abs=0.1)
    assert memorised_share(fresh + 50, train, test).share == 0


# ---------------------------------------------------------------------- codes and rate


def layout_of(vocabulary_size: int = 8) -> TokenLayout:
    field = Field("code", vocabulary_size)
    scales = (Scale("coarse", 1, (1, 1), 0, (field,), (8, 8)), Scale("fine", 4, (2, 2), 1, (field,), (16, 16)))
    return TokenLayout(scales)


def test_perplexity_of_uniform_constant_and_empty_counts() -> None:
    assert perplexity(torch.full((16,), 5)) == pytest.approx(16)
    assert perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    with pytest.raises(ValueError, match="no tokens"):
        perplexity(torch.zeros(3))


def test_code_use_and_rate_per_scale() -> None:
    layout = layout_of()
    ids = torch.zeros(8, 5, 1, dtype=torch.int64)
    ids[:, 1:, 0] = torch.arange(8)[:, None]
    tokens = Tokens.fixed(ids)
    coarse, fine = code_use(tokens, layout)
    assert (coarse.used, coarse.perplexity, coarse.num_tokens) == (1, pytest.approx(1), 8)
    assert (fine.used, fine.perplexity, fine.share) == (8, pytest.approx(8), 1)
    bits = sums_of_scales([1.0, 0.5, 0.5, 1.0, 2.0], layout)
    assert bits == [1, 4]
    cheap, full = rates([coarse, fine], 8, layout, bits)
    assert (cheap.fixed_length_bits, cheap.entropy_bits) == (pytest.approx(3), pytest.approx(0, abs=1e-12))
    assert (full.fixed_length_bits, full.entropy_bits, full.prior_bits) == (12, pytest.approx(12), pytest.approx(4))


def test_joint_use_of_fields_that_tell_of_each_other() -> None:
    """The second field follows from the first, so their joint entropy is that of one field."""
    fields = (Field("a", 4), Field("b", 4))
    layout = TokenLayout((Scale("one", 4, (2, 2), 0, fields, (8, 8)),))
    first = torch.arange(4).repeat(20, 1)
    (joint,) = joint_use(Tokens.fixed(torch.stack([first, 3 - first], dim=-1)), layout)
    assert (joint.used, joint.num_tokens, joint.too_few_tokens) == (4, 80, False)
    assert (joint.entropy_bits, joint.field_bits) == (pytest.approx(2), pytest.approx(4))
    (few,) = joint_use(Tokens.fixed(torch.stack([first, 3 - first], dim=-1)[:9]), layout)
    assert few.too_few_tokens
    assert joint_use(Tokens.fixed(first.unsqueeze(-1)), layout_of()) == []


def test_elements_beyond_the_length_do_not_count() -> None:
    tokens = Tokens.fixed(torch.arange(5).reshape(1, 5, 1)).prefix(5)
    tokens.lengths = torch.tensor([3])
    assert [use.num_tokens for use in code_use(tokens, layout_of())] == [1, 2]


# ---------------------------------------------------------------------- distortion


def test_psnr_of_a_known_error_and_of_equal_images() -> None:
    a = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 10
    assert psnr(a, b).tolist() == pytest.approx([HIGHEST_PSNR, 28.1308], abs=1e-3)
    assert ssim(a, b)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="11"):
        ssim(a[..., :8, :8], b[..., :8, :8])


# ---------------------------------------------------------------------- classifier


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy horizontal and vertical stripes, in a ratio of three to one."""
    labels = (torch.arange(count) % 4 == 0).long()
    wave = ((torch.arange(28) // 3) % 2) * 160.0
    images = torch.where(labels[:, None, None] == 0, wave[None, :, None], wave[None, None, :]).unsqueeze(1)
    noisy = images + 40 * torch.rand(count, 1, 28, 28, generator=generator(seed))
    return noisy.expand(-1, 1, 28, 28).to(torch.uint8), labels


def test_classifier_learns_what_is_separable_and_repeats_itself() -> None:
    pixels, labels = stripes(256, 1)
    state = torch.random.get_rng_state()
    classifier = train_classifier(pixels, labels, 2, steps=20, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    held_out = classifier.accuracy(*stripes(64, 2))
    assert held_out.total > 0.95 and held_out.balanced > 0.95
    features = classifier.features(pixels[:8])
    assert features.shape == (8, 128) and features.dtype == torch.float32
    again = train_classifier(pixels, labels, 2, steps=20, seed=0)
    assert torch.equal(features, again.features(pixels[:8]))
    with pytest.raises(ValueError, match="labels"):
        train_classifier(pixels, labels, 1, steps=1, seed=0)


def test_accuracy_balances_classes_and_leaves_out_missing_ones() -> None:
    found = accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), 3)
    assert (found.total, found.balanced, found.per_class) == (0.75, 0.5, [1.0, 0.0, None])


def test_thumbnails_average_only_what_is_large() -> None:
    small = torch.randint(0, 256, (2, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    assert thumbnails(small) is small
    large = F.interpolate(small.float(), scale_factor=4).to(torch.uint8)[..., :64, :64]
    assert thumbnails(large).shape == (2, 1, 32, 32)


# ---------------------------------------------------------------------- sheets


def test_sheet_enlarges_without_smoothing() -> None:
    image = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    picture = sheet([[image, image], [image]], ("first", "second"), ("a", "b"))
    assert picture.mode == "RGBA"
    cell = picture.crop((picture.width - 96, picture.height - 96 * 2 - 4, picture.width, picture.height - 100))
    colours = {colour for _, colour in cell.getcolors() or []}
    assert colours == {(0, 0, 0, 255), (255, 255, 255, 255)}
    assert error_picture(image, 255 - image).unique().tolist() == [255]
    with pytest.raises(ValueError, match="at least one"):
        sheet([])


def test_modules_hold_guests_without_owning_them() -> None:
    from stages.measures.perceptual import Guest

    owner = nn.Module()
    owner.guest = Guest(nn.Linear(2, 2))
    assert not owner.state_dict() and not list(owner.parameters())
    owner.to(torch.float64)
    assert owner.guest.guest.weight.dtype == torch.float64  # type: ignore[union-attr]
