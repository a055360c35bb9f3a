"""Resolution ladder, upsampling and editing: measures compared with independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data.images.views import to_float, to_uint8
from data.layout import Field, Scale, TokenLayout
from stages.factory import build_tokenizer
from stages.measures.distortion import psnr
from stages.measures.editing import others_of
from stages.measures.ladder import (
    Contender,
    better,
    measure_agreement,
    measure_rung,
    measure_sampling_time,
    time_interleaved,
)
from stages.measures.reconstruction import reconstruct
from stages.measures.upsampling import consistency, enlarge, reduce_to
from stages.tokenizer.quantizers import FSQ, CosineVQ, CosineVQConfig, FSQConfig
from stages.tokenizer.sit import SIT, SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig

WIDTH = TransformerConfig(depth=2, width=32, heads=4)
CPU = torch.device("cpu")


def images(count: int = 12) -> Tensor:
    """Smooth random images uint8 [count, 3, 16, 16]."""
    coarse = torch.randint(0, 256, (count, 3, 5, 5), generator=torch.Generator().manual_seed(1)).float()
    fine = torch.randint(-20, 21, (count, 3, 16, 16), generator=torch.Generator().manual_seed(2))
    large = functional.interpolate(coarse, (16, 16), mode="bilinear") + fine
    return large.clamp(0, 255).to(torch.uint8)


def shaken(config: SITConfig) -> SIT:
    """A tokenizer with large weights, so that every token matters, and fitted statistics."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config, (16, 16), 3)
    assert isinstance(tokenizer, SIT)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer.fit([(to_float(images()), None)])
    return tokenizer.eval()


def sit(attention: str = "sit-sc", quantizer=None) -> SIT:
    return shaken(
        SITConfig(scales=3, attention=attention, encoder=WIDTH, decoder=WIDTH, quantizer=quantizer or FSQConfig())
    )


def agreement(tokenizer: SIT, pixels: Tensor) -> dict:
    return measure_agreement(tokenizer, pixels, reconstruct(tokenizer, pixels, 5, CPU).tokens, 5, CPU)


@pytest.mark.parametrize("attention", ["sit-sc", "sit-sce"])
@pytest.mark.parametrize("quantizer", [FSQConfig(), CosineVQConfig(codes=64, code_dim=8)])
def test_small_images_give_the_first_tokens_of_the_large_ones(attention: str, quantizer) -> None:
    found = agreement(sit(attention, quantizer), images())
    # 12 images with 4 tokens at the first rung and 8 at the second
    assert found["positions"] == 12 * (4 + 8)
    assert found["mismatches"] == found["mismatches_that_are_ties"]
    assert found["agreeing_share"] == 1 - found["mismatches"] / found["positions"]


@pytest.mark.parametrize("quantizer", [FSQConfig(), CosineVQConfig(codes=64, code_dim=8)])
def test_tokens_of_a_dense_encoder_do_not_agree_and_are_no_ties(quantizer) -> None:
    pixels, causal, dense = images(), sit("sit-sce", quantizer), sit("sit", quantizer)
    # the same weights and the same layout, but every token attends to all scales
    dense.layout = causal.layout
    found = agreement(dense, pixels)
    assert found["agreeing_share"] < 0.9
    assert found["mismatches_that_are_ties"] < 0.1 * found["mismatches"]
    assert found["largest_margin_of_a_mismatch"] > 1e-3


def test_images_rounded_to_bytes_are_not_what_the_encoder_sees() -> None:
    """The check distinguishes reduced images from nearly equal ones."""
    tokenizer, pixels = sit("sit-sce"), images(200)
    assert agreement(tokenizer, pixels)["mismatches"] == agreement(tokenizer, pixels)["mismatches_that_are_ties"]
    whole = tokenizer.reference

    def rounded(pixels: Tensor, num_scales: int) -> Tensor:
        return to_float(to_uint8(whole(pixels, num_scales)))

    tokenizer.reference = rounded  # type: ignore[method-assign]
    found = agreement(tokenizer, pixels)
    assert 0.5 < found["agreeing_share"] < 1 and found["mismatches_that_are_ties"] < found["mismatches"]


def test_margins_are_distances_to_another_choice() -> None:
    features = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(3))
    quantizer = FSQ(FSQConfig(levels=[5]), 8, 8)
    with torch.no_grad():
        values = torch.tanh(quantizer.project_in(features)[..., 0]) * 2.002
    distance = (values.unsqueeze(-1) - torch.tensor([-1.5, -0.5, 0.5, 1.5])).abs().amin(-1)
    inside = values.abs() < 2  # there is no boundary beyond the last value
    torch.testing.assert_close(quantizer.margins(features)[inside], distance[inside], atol=1e-6, rtol=0)
    tokenizer = sit("sit-sce", CosineVQConfig(codes=64, code_dim=8))
    assert tokenizer.margins(to_float(images(2))).shape == (2, 12)
    first = tokenizer.quantizers[0]
    assert isinstance(first, CosineVQ)
    first.codebook.weight.data[:] = first.codebook.weight.data[0].clone()
    # 64 equal codes: all choices tie
    assert tokenizer.margins(to_float(images(2)))[:, :4].abs().max() < 1e-6


def test_rungs_beside_a_baseline_equal_an_independent_computation() -> None:
    own, pixels = sit(), images()
    baseline = shaken(ViTVQGANConfig(patch=4, encoder=WIDTH, decoder=WIDTH, quantizer=FSQConfig(levels=[3, 3])))
    for num_scales, side in ((1, 4), (2, 8), (3, 16)):
        found = measure_rung(Contender(own, None), Contender(baseline, None), pixels, num_scales, 5, CPU)
        small = functional.avg_pool2d(to_float(pixels), 16 // side)
        wanted = to_uint8(own.reference(to_float(pixels), num_scales))
        assert ((small + 1) * 127.5 - wanted).abs().max() < 0.501  # halves may be rounded up or down
        with torch.no_grad():
            tokens = [own.encode(to_float(part)) for part in wanted.split(5)]
            decoded = torch.cat([to_uint8(own.decode(part)) for part in tokens])
            large = functional.interpolate(wanted.float(), size=16, mode="bicubic").round().clamp(0, 255)
            whole = to_uint8(baseline.decode(baseline.encode(large / 127.5 - 1))).float()
        back = whole.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5)).round()
        assert found["image_size"] == [side, side]
        for who, made in (("tokenizer", decoded), ("baseline", back)):
            error = (made.double() - wanted.double()).square().mean((1, 2, 3))
            expected = float((10 * (255**2 / error).log10()).mean())
            # halves may be rounded up or down
            assert found[who]["psnr_mean_of_images"] == pytest.approx(expected, abs=0.01)
        assert found["tokenizer"]["tokens_per_image"] == 4 * num_scales and found["baseline"]["tokens_per_image"] == 16
        # 1000 and 9 codes; the baseline uses all of its tokens at every rung
        assert found["tokenizer"]["fixed_length_bits_per_pixel"] == pytest.approx(
            4 * num_scales * math.log2(1000) / side**2
        )
        assert found["baseline"]["fixed_length_bits_per_pixel"] == pytest.approx(16 * math.log2(9) / side**2)
        ids = torch.cat([part.ids for part in tokens]).flatten(1).split(4, dim=1)
        shares = [part.unique(return_counts=True)[1].double() / part.numel() for part in ids]
        entropy = sum(float(-4 * (share * share.log2()).sum()) for share in shares)
        assert found["tokenizer"]["entropy_bits_per_pixel"] == pytest.approx(entropy / side**2)
        lead = found["tokenizer"]["psnr_mean_of_images"] - found["baseline"]["psnr_mean_of_images"]
        assert found["better"] == {"psnr": "tokenizer" if lead > 0 else "baseline"}


def test_the_better_one_is_higher_in_psnr_and_lower_in_distances() -> None:
    first = {"psnr_mean_of_images": 20.0, "perceptual_lite0": {"mean": 1.0}, "fd_lite0": {"value": 5.0}}
    second = {"psnr_mean_of_images": 21.0, "perceptual_lite0": {"mean": 2.0}, "fd_lite0": {"value": 5.0}}
    assert better(first, second) == {"psnr": "baseline", "perceptual_lite0": "tokenizer", "fd_lite0": "equal"}
    assert better({"psnr_mean_of_images": 22.0}, second) == {"psnr": "tokenizer"}


def test_times_are_taken_in_turn_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = time_interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b"] * 3 and [len(part) for part in seconds] == [2, 2]
    with pytest.raises(ValueError, match="0 repeats"):
        time_interleaved([], 0)


def test_time_that_grows_like_the_tokens_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("stages.measures.ladder.time.perf_counter", lambda: clock[0])

    def draw(num_scales: int) -> None:
        clock[0] += 2 * num_scales

    scales = tuple(Scale(f"s{k}", 4, (2, 2), min(k, 1), (Field("code", 8),), (2**k, 2**k)) for k in range(3))
    found = measure_sampling_time(draw, TokenLayout(scales), 3)
    assert [entry["tokens"] for entry in found] == [4, 8, 12]
    assert [entry["share_of_tokens"] for entry in found] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [entry["seconds"] for entry in found] == [2, 4, 6]
    assert [entry["time_over_tokens"] for entry in found] == pytest.approx([1, 1, 1])
    assert found[-1]["share_of_full_time"] == 1


def test_consistency_compares_reduced_images_with_small_ones() -> None:
    original = images()
    small = reduce_to(original, 8)
    # averaging 2 x 2 equal pixels gives the pixel back
    assert consistency(small.repeat_interleave(2, -1).repeat_interleave(2, -2), small) == 100
    assert consistency(original, small) == 100
    bicubic = enlarge(small, 16)
    reduced = bicubic.double().unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)).round()
    assert consistency(bicubic, small) == pytest.approx(float(psnr(reduced, small).mean()), abs=0.05)
    assert 20 < consistency(bicubic, small) < 100
    with pytest.raises(ValueError, match="16 px cannot be averaged down to 5"):
        reduce_to(original, 5)


def test_every_image_is_paired_with_one_of_another_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 1, 0])
    chosen = others_of(labels, 0)
    assert torch.equal(chosen, others_of(labels, 0)) and (labels[chosen] != labels).all()
    assert any(not torch.equal(chosen, others_of(labels, seed)) for seed in (1, 2, 3))
    with pytest.raises(ValueError, match="one class"):
        others_of(torch.zeros(3, dtype=torch.int64), 0)
