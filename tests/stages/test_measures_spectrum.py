"""Power spectra of waves and of low-passed images; calibration of calibrated and overconfident predictors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.measures.calibration import calibrate, measure_calibration
from stages.measures.spectrum import decibels_over, measure_frequencies, octaves_of, power_spectrum


def noise(count: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (128 + 30 * torch.randn(count, 3, side, side, generator=generator)).round().clamp(0, 255).to(torch.uint8)


def wave(side: int, cycles: int, amplitude: float = 100) -> Tensor:
    places = (torch.arange(side) + 0.5) / side
    row = 127.5 + amplitude * torch.cos(2 * torch.pi * cycles * places)
    return row.expand(1, 1, side, side).round().to(torch.uint8)


def low_passed(pixels: Tensor, below: float) -> Tensor:
    """The images without frequencies of ``below`` or more cycles per side."""
    side = pixels.shape[-1]
    frequency = torch.fft.fftfreq(side, 1 / side)
    kept = (frequency[:, None].square() + frequency.square()).sqrt() < below
    return torch.fft.ifft2(torch.fft.fft2(pixels.double()) * kept).real.round().clamp(0, 255).to(torch.uint8)


def test_a_wave_has_its_power_at_its_frequency_at_every_size() -> None:
    found = {side: power_spectrum(wave(side, 5)) for side in (32, 64)}
    for side, spectrum in found.items():
        assert len(spectrum) == side // 2 - 1 and int(spectrum.argmax()) == 4
        # the window spreads it over its neighbors only
        far = torch.cat([spectrum[:2], spectrum[7:]])
        assert far.max() < 1e-4 * spectrum.max()
    torch.testing.assert_close(found[32][3:6], found[64][3:6], rtol=0.02, atol=0)
    # a quarter of the amplitude is 12 dB less
    assert decibels_over(power_spectrum(wave(64, 5, 25)), found[64])[4] == pytest.approx(-12.04, abs=0.1)


def test_noise_is_flat_and_a_constant_image_has_no_power() -> None:
    spectrum = power_spectrum(noise(64, 32, 0))
    # subtracting the mean also removes a part of the lowest frequency
    assert spectrum[1:].max() / spectrum[1:].min() < 1.1
    assert float(power_spectrum(torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)).max()) < 1e-20
    assert all(abs(each) < 1e-9 for each in decibels_over(spectrum, spectrum))
    for shape in ((1, 1, 2, 2), (1, 1, 8, 16)):
        with pytest.raises(ValueError, match="square images of 4 px or more"):
            power_spectrum(torch.zeros(shape, dtype=torch.uint8))


def test_octaves_hold_all_power_of_their_rings() -> None:
    octaves = octaves_of(torch.ones(15))
    assert octaves.tolist() == [1, 2 + 3, 4 + 5 + 6 + 7, sum(range(8, 16))]


def test_a_low_passed_image_drops_where_it_should_and_nowhere_else() -> None:
    images = noise(16, 32, 1)
    found = measure_frequencies(power_spectrum(images), low_passed(images, 8), images)
    assert found is not None
    kept, lost = found["decoded"][:6], found["decoded"][9:]
    assert max(map(abs, kept)) < 0.3 and max(lost) < -15
    assert max(map(abs, found["wanted"])) == 0
    octaves = found["decoded_octaves"]
    assert [round(value) for value in octaves[:2]] == [0, 0] and octaves[3] < -10


def test_a_smaller_image_is_compared_at_the_frequencies_it_has() -> None:
    images = low_passed(noise(32, 32, 2), 3.5)
    small = F.avg_pool2d(images.float(), 2).round().to(torch.uint8)
    found = measure_frequencies(power_spectrum(images), small, small)
    assert found is not None and found["image_size"] == [16, 16]
    assert len(found["decoded"]) == 7 and found["decoded"] == found["wanted"]
    # averaging two pixels scales a wave's power by cos²(πf/32) along its axis
    assert all(-0.6 < value < 0.1 for value in found["decoded"][:3])
    assert measure_frequencies(power_spectrum(images), small[..., :2, :2], small[..., :2, :2]) is None


# ---------------------------------------------------------------------- calibration


def predictions(count: int, honest: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidences in [0.2, 0.8], correct with ``honest`` times that probability."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.2 + 0.6 * torch.rand(count, generator=generator)
    return confidence, torch.rand(count, generator=generator) < honest * confidence


def test_a_calibrated_predictor_has_no_error_and_a_boaster_his_excess() -> None:
    honest, boaster = calibrate(*predictions(60_000, 1)), calibrate(*predictions(60_000, 0.5))
    assert honest.expected_error < 0.01
    # mean confidence 0.5, accuracy half of that
    assert boaster.expected_error == pytest.approx(0.25, abs=0.01)
    assert all(a < c for a, c in zip(boaster.accuracy, boaster.confidence, strict=True))
    assert boaster.confidence == sorted(boaster.confidence) and sum(boaster.count) == 60_000
    modest = calibrate(torch.full((1000,), 0.3), torch.ones(1000, dtype=torch.bool))
    assert modest.expected_error == pytest.approx(0.7)


def test_small_probabilities_do_not_share_one_bin() -> None:
    """Half of the tokens at 1 %, half at 5 %, with accuracies exchanged; bins of equal width would not detect it."""
    confidence = torch.tensor([0.01, 0.05]).repeat_interleave(30_000)
    hit = torch.rand(60_000, generator=torch.Generator().manual_seed(0)) < confidence.flip(0)
    assert calibrate(confidence, hit).expected_error == pytest.approx(0.04, abs=0.005)
    assert abs(float(confidence.mean()) - float(hit.float().mean())) < 0.002


def test_equal_bins_agree_with_torchmetrics_where_the_data_makes_them_equal() -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    generator = torch.Generator().manual_seed(1)
    confidence = (torch.arange(15_000) + 0.5) / 15_000
    hit = torch.rand(15_000, generator=generator) < confidence.square()
    expected = binary_calibration_error(confidence, hit.long(), n_bins=15)
    assert calibrate(confidence, hit).expected_error == pytest.approx(float(expected), abs=2e-4)
    with pytest.raises(ValueError, match="needs predictions"):
        calibrate(confidence[:0], hit[:0])
    assert calibrate(confidence[:4], hit[:4]).count == [1, 1, 1, 1]


def test_calibration_is_told_by_scale_and_by_position() -> None:
    """The first scale is calibrated, the second one is overconfident."""
    honest, boasting = (predictions(4000 * 2, share, seed) for share, seed in ((1, 1), (0.5, 2)))
    confidence, hit = (
        torch.cat([a.view(4000, 2, 1), b.view(4000, 2, 1)], dim=1) for a, b in zip(honest, boasting, strict=True)
    )
    found = measure_calibration(confidence, hit, {"coarse": 2, "fine": 4})
    coarse, fine = found["scales"]
    assert (coarse["scale"], fine["scale"]) == ("coarse", "fine")
    assert coarse["expected_calibration_error"] < 0.03 < 0.2 < fine["expected_calibration_error"]
    gaps = [c - a for c, a in zip(found["confidence_by_position"], found["accuracy_by_position"], strict=True)]
    assert gaps == pytest.approx([0, 0, 0.25, 0.25], abs=0.03)
    assert found["expected_calibration_error"] == pytest.approx(0.125, abs=0.02)
