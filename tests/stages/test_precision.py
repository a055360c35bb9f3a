"""Precision: resolution of ``auto`` by machine, and models that compute in their own precision."""

from types import SimpleNamespace

import pytest
import torch

from data.errors import InputError
from stages import precision
from stages.factory import build_tokenizer
from stages.precision import autocast, resolve, running_in, slowness
from stages.prior.sampling import SamplingConfig, sample
from stages.tokenizer.sit import SITConfig
from stages.tokenizer.transformer import TransformerConfig
from tests.stages.test_prior import LABELS, layout, prior, tokens

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Simulate a CPU with given capabilities and given seconds for a product in float32 and bfloat16."""

    def play(capabilities, single, half, architecture="x86_64"):
        precision._fastest.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(precision.platform, "machine", lambda: architecture)
        seconds = {torch.float32: single, torch.bfloat16: half}
        monkeypatch.setattr(precision, "_product_seconds", lambda kind, dtype: seconds[dtype])

    yield play
    precision._fastest.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "single", "half", "architecture", "expected"),
    [
        ({"avx2": True}, 1.0, 130.0, "x86_64", "32"),
        ({"avx2": True}, 1.0, 0.1, "x86_64", "32"),  # the hardware lacks bf16, so timing does not matter
        ({"amx_bf16": True}, 1.0, 0.2, "x86_64", "bf16"),
        ({"amx_bf16": True}, 1.0, 130.0, "x86_64", "32"),  # the library does not use the hardware support
        ({"avx512_bf16": True}, 1.0, 0.6, "x86_64", "bf16"),
        ({"avx512_bf16": True}, 1.0, 1.0, "x86_64", "32"),
        ({"neon": True, "bf16": True}, 1.0, 0.5, "aarch64", "bf16"),
        ({"neon": True}, 1.0, 9.0, "aarch64", "32"),
        ({}, 1.0, 0.5, "riscv64", "bf16"),  # capabilities are unknown, so timing decides
    ],
)
def test_the_hardware_may_rule_bf16_out_and_the_clock_decides(
    machine, capabilities, single, half, architecture, expected
):
    machine(capabilities, single, half, architecture)
    assert resolve("auto", CPU) == expected
    assert resolve("32", CPU) == "32" and resolve("bf16", CPU) == "bf16"
    assert slowness("32", CPU) is None
    assert (slowness("bf16", CPU) is None) == (expected == "bf16")


def test_what_emulation_costs_is_said(machine):
    machine({"avx2": True}, 0.001, 0.05)
    assert slowness("bf16", CPU) == (
        "bf16 is emulated on this cpu: a matrix product takes 50 times as long as in float32"
    )


@pytest.mark.parametrize(("durations", "least"), [([0.2], 0.2), ([0.009, 0.005, 0.018], 0.005)])
def test_the_fastest_of_the_products_that_begin_in_time_counts(monkeypatch, durations, least):
    """Uses a simulated clock with given durations of the products."""
    moments = [0.0, 0.0]
    for duration in durations:
        moments += [moments[-1] + duration] * 2
    monkeypatch.setattr(precision.time, "perf_counter", iter(moments).__next__)
    precision._product_seconds.cache_clear()
    assert precision._product_seconds("cpu", torch.float32) == pytest.approx(least)
    precision._product_seconds.cache_clear()


def test_devices_without_bf16_take_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for kind in ("mps", "cuda"):
        device = SimpleNamespace(type=kind)
        assert resolve("auto", device) == "32"
        with pytest.raises(InputError, match=f"this {kind} device has no bfloat16; allowed: auto, 32"):
            resolve("bf16", device)
    precision._fastest.cache_clear()


def tokenizer():
    torch.manual_seed(0)
    part = TransformerConfig(depth=1, width=32, heads=4)
    return build_tokenizer(SITConfig(scales=2, patch=2, encoder=part, decoder=part), (16, 16), 3).eval()


def test_a_tokenizer_computes_in_its_own_precision_whoever_calls():
    model, pixels = tokenizer().requires_grad_(False), torch.rand(2, 3, 16, 16) * 2 - 1
    single = model.decode(model.encode(pixels))
    with autocast("bf16", CPU):
        expected = model.decode(model.encode(pixels))
    model.precision = "bf16"
    found = model.decode(model.encode(pixels))
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert not torch.equal(found, single)
    model.precision = "32"
    with autocast("bf16", CPU):
        assert torch.equal(model.decode(model.encode(pixels)), single)


@pytest.mark.parametrize("order", ["natural", "scale"])
def test_weights_cast_once_give_the_bits_of_autocast_and_are_put_back(order):
    model = prior(layout(), order=order).requires_grad_(False)
    settings, before = SamplingConfig(guidance=2.0), {key: value.clone() for key, value in model.state_dict().items()}
    with autocast("bf16", CPU):
        expected = sample(model, LABELS, settings, [0, 1, 2])
    with running_in(model, "bf16"):
        assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        found = sample(model, LABELS, settings, [0, 1, 2])
    assert torch.equal(found.ids, expected.ids)
    assert model.precision is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_likelihoods_follow_the_precision_and_stay_float32():
    model, given = prior(layout()).requires_grad_(False), tokens(layout())
    single = model.nll(given, LABELS)
    with running_in(model, "bf16"):
        half = model.nll(given, LABELS)
    assert half.dtype == torch.float32 and not torch.equal(half, single)
    torch.testing.assert_close(half, single, atol=0.1, rtol=0.1)
