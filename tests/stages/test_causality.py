"""Causality: codes with known dependence give the expected R², and independent codes give 0."""

import pytest
import torch

from data.layout import Tokens
from stages.factory import build_tokenizer
from stages.measures import causality
from stages.measures.causality import FEWEST_IMAGES, measure_causality, predictability
from stages.measures.gains import measure_gains
from stages.tokenizer.quantizers import CosineVQConfig, FSQConfig
from stages.tokenizer.sit import SITConfig
from tests.stages.test_nested import make, pixels


def walk(count=4000, length=6, width=2, share=0.6):
    """Codes [n, L, D]: a ``share`` of the variance of each code comes from the previous code, the rest is new."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(count, length, width, dtype=torch.float64, generator=generator)
    codes = [new[:, 0]]
    for position in range(1, length):
        codes.append(share**0.5 * codes[-1] + (1 - share) ** 0.5 * new[:, position])
    return torch.stack(codes, dim=1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_r2_is_the_share_that_follows(share):
    codes = walk(share=share)
    found = predictability(codes, codes)
    assert len(found) == 5 and found == pytest.approx([share] * 5, abs=0.04)
    other = predictability(codes[torch.randperm(len(codes))], codes)
    assert max(map(abs, other)) < 0.02


def test_scale_and_shift_of_codes_change_nothing():
    codes = walk()
    moved = codes * torch.tensor([100.0, 100.0]) + 7
    assert predictability(moved, moved) == pytest.approx(predictability(codes, codes), abs=1e-9)


def test_the_ridge_is_not_chosen_on_the_images_that_are_measured(monkeypatch):
    """On pure noise, choosing the best of many ridges on the measured images would look better than chance."""
    monkeypatch.setattr(causality, "RIDGES", tuple(10.0**power for power in range(-6, 6)))
    found = []
    for seed in range(60):
        codes = torch.randn(64, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found += predictability(codes, codes)
    assert sum(found) < 0


def test_more_inputs_than_images_do_not_look_like_order():
    codes = torch.randn(80, 30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert max(predictability(codes, codes)) < 0.3  # without a ridge it would be far below 0 or near 1
    assert min(predictability(codes, codes)) > -0.5


def test_a_token_that_is_the_sum_of_all_before_is_known_forwards_only():
    codes = torch.randn(2000, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes[:, 3] = codes[:, :3].sum(1)
    forwards, backwards = predictability(codes, codes), predictability(codes.flip(1), codes.flip(1))
    assert forwards == pytest.approx([0, 0, 1], abs=0.02)
    assert backwards == pytest.approx([1 / 3, 1 / 2, 1], abs=0.05)


def test_constant_tokens_are_zero():
    codes = walk(400)
    codes[:, 2:4] = 0.5
    found = predictability(codes, codes)
    assert found[1] == found[2] == 0 and all(value == value for value in found)


@pytest.mark.parametrize("quantizer", [FSQConfig(), CosineVQConfig(codes=64, code_dim=8)])
def test_tokenizers_are_measured_both_ways(quantizer):
    for tokenizer in (make(quantizer), build_tokenizer(SITConfig(quantizer=quantizer), (32, 32), 3).eval()):
        tokens = tokenizer.encode(pixels(FEWEST_IMAGES))
        found = measure_causality(tokenizer, tokens)
        assert found["tokens"] == tokens.ids.shape[1]
        assert found["num_fitted"] + 2 * found["num_measured"] == FEWEST_IMAGES
        for name in ("natural", "reversed"):
            assert len(found[name]["r2"]) == len(found[name]["r2_shuffled"]) == found["tokens"] - 1
        assert found["too_few_images"] and measure_causality(tokenizer, tokens[:10]) is None
        codes = tokenizer.codes(tokens)
        assert codes.shape == (*tokens.ids.shape[:2], found["code_width"])


def test_codes_are_what_lookup_projects():
    for quantizer in (FSQConfig(levels=[8, 5]), CosineVQConfig(codes=64, code_dim=8)):
        part = make(quantizer).quantizer
        ids = torch.randint(40, (2, 5, 1))
        assert torch.equal(part.project_out(part.codes(ids)), part.lookup(ids))
        with pytest.raises(ValueError, match="id 99"):
            part.codes(torch.full((1, 1, 1), 99))


def test_gains_add_up_to_the_whole_and_what_adds_nothing_is_counted():
    tokenizer, images = make(), ((pixels(8) + 1) * 127.5).to(torch.uint8)
    tokens = tokenizer.encode(images.float() / 127.5 - 1)
    found = measure_gains(tokenizer, images, tokens, 4, torch.device("cpu"))
    assert found["psnr_of_mean"] + sum(found["gain"]) == pytest.approx(found["psnr"][-1])
    assert len(found["gain"]) == 12 and found["not_above_zero"] == sum(gain <= 0 for gain in found["gain"])

    class Nothing:
        """Decodes every prefix to the same image."""

        layout = tokenizer.layout

        def first_scales(self, tokens, number):
            return tokens.prefix(number)

        def decode(self, tokens):
            return torch.zeros(len(tokens), 3, 32, 32)

    same = measure_gains(Nothing(), images, Tokens.fixed(tokens.ids), 4, torch.device("cpu"))
    assert same["not_above_zero"] >= 11


def test_codes_too_long_are_left_out(monkeypatch):
    tokenizer = make()
    tokens = tokenizer.encode(pixels(FEWEST_IMAGES))
    assert measure_causality(tokenizer, tokens) is not None
    monkeypatch.setattr(causality, "MOST_INPUTS", 47)
    assert measure_causality(tokenizer, tokens) is None
