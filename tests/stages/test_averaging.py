"""Moving averages between the prior's layers: equal to the definition, causal, within borders, and cached."""

import math

import pytest
import torch

from data.layout import Field, Scale, TokenLayout, Tokens
from stages.conditions.labels import ClassConditionConfig
from stages.conditions.text import TextConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior
from stages.prior.averaging import MIXED, MovingAverages, Segment, segments_of
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.transformer import TransformerPriorConfig
from tests.stages import toys
from tests.stages.bitplanes import codec, smooth

LEGAL = [
    *((kind, borders) for kind in ("replace", "mix") for borders in ("sample", "scale", "grid")),
    ("learned", "sample"),
    ("learned", "scale"),
]
STATES = 3


def layout():
    """Scales of 1, 2x3 and 4x4 elements."""
    fields = (Field("code", 11),)
    grids = [(1, 1), (2, 3), (4, 4)]
    return TokenLayout(
        tuple(Scale(f"s{n}", math.prod(grid), grid, 0, fields, (4 << n, 4 << n)) for n, grid in enumerate(grids))
    )


def module(kind, borders, width=24, **keys):
    return MovingAverages(kind, width, segments_of(layout(), STATES, layout().length, borders), **keys)


def by_hand(averages, x, kind):
    """The definition, computed slot by slot and feature by feature."""
    found = x.clone()
    half = x.shape[2] // 2
    for segment in averages.segments:
        levels = len(averages.windows)
        for number in range(segment.rows * segment.columns):
            row, column = divmod(number, segment.columns)
            for coordinate in range(half):
                window = 2 ** (1 + levels * coordinate // half)
                rows = range(max(0, row - window + 1), row + 1) if segment.rows > 1 else [0]
                places = [
                    segment.start + r * segment.columns + c
                    for r in rows
                    for c in range(max(0, column - window + 1), column + 1)
                ]
                place, at = segment.start + number, x.shape[2] - half + coordinate
                mean = x[:, places, at].mean(1)
                found[:, place, at] = (1 - MIXED) * x[:, place, at] + MIXED * mean if kind == "mix" else mean
    return found


@pytest.mark.parametrize(("kind", "borders"), LEGAL)
def test_averages_are_those_of_the_definition(kind, borders):
    averages = module(kind, borders)
    x = torch.randn(2, averages.size, 24)
    wanted = by_hand(averages, x, kind)
    assert torch.allclose(averages(x), wanted, atol=1e-5)  # learned windows are initialized as boxes
    assert torch.equal(averages(x)[..., :12], x[..., :12])
    assert averages.size == STATES + layout().length - 1


@pytest.mark.parametrize(("kind", "borders"), LEGAL)
def test_one_slot_at_a_time_is_the_full_pass_and_so_is_a_beginning(kind, borders):
    averages = module(kind, borders)
    with torch.no_grad():
        for kernel in averages.kernels:
            kernel.add_(torch.randn_like(kernel))
        x = torch.randn(2, averages.size, 24)
        full = averages(x)
        for begun in (1, 4, 12):
            assert torch.allclose(averages(x[:, :begun]), full[:, :begun], atol=1e-5)
            room = averages.room(2, averages.size, x.device)
            assert torch.allclose(averages(x[:, :begun], room, torch.arange(begun)), full[:, :begun], atol=1e-5)
            for slot in range(begun, averages.size):
                step = averages(x[:, slot : slot + 1], room, torch.tensor([slot]))
                assert torch.allclose(step[:, 0], full[:, slot], atol=1e-5)


@pytest.mark.parametrize(("kind", "borders"), LEGAL)
def test_the_future_and_other_segments_have_no_say(kind, borders):
    averages = module(kind, borders)
    x = torch.randn(1, averages.size, 24)
    before = averages(x)
    for slot in range(averages.size):
        changed = x.clone()
        changed[:, slot] += 1
        moved = (averages(changed) - before).abs().amax((0, 2)) > 1e-6
        mine = next(segment for segment in averages.segments if segment.start <= slot < segment.stop)
        assert moved[slot] and not moved[:slot].any() and not moved[mine.stop :].any()


@pytest.mark.parametrize(("kind", "borders"), LEGAL)
def test_a_constant_stays(kind, borders):
    averages = module(kind, borders)
    x = torch.randn(1, 1, 24).expand(2, averages.size, 24)
    assert torch.allclose(averages(x), x, atol=1e-5)


def test_windows_are_powers_of_two_in_equal_shares():
    averages = MovingAverages("replace", 128, [Segment(0, 1, 512)])
    assert averages.windows == [2, 4, 8, 16, 32, 64, 128, 256, 512] and set(averages.groups) == {7, 8}
    assert MovingAverages("replace", 128, [Segment(0, 1, 512)], longest=9).windows == [2, 4, 8]
    assert not list(averages.parameters())
    learned = MovingAverages("learned", 128, [Segment(0, 1, 512)])
    assert sum(parameter.numel() for parameter in learned.parameters()) == 1022


def test_sums_stay_in_float32_under_autocast():
    averages = module("replace", "sample")
    x = (1000 + torch.rand(1, averages.size, 24)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = averages(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, by_hand(averages, x.float(), "replace").bfloat16())


@pytest.mark.parametrize(("kind", "borders"), LEGAL)
@pytest.mark.parametrize("attend", [None, "prefix", "cross"])
def test_the_prior_with_averages_samples_what_it_says(kind, borders, attend):
    """Cached sampling and the full pass agree, with one or several condition states before the tokens."""
    torch.manual_seed(0)
    letters = {"encoder": "words", "max_tokens": 3, "width": 0, "empty_length": 0, "vocabulary": ["a", "b", "c"]}
    config = TransformerPriorConfig(depth=3, width=32, heads=4, dropout=0.0, averaging=kind, averaging_borders=borders)
    condition = ClassConditionConfig() if attend is None else TextConditionConfig(attend=attend)
    prior = build_prior(config, condition, layout(), ["a", "b"], None if attend is None else letters).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    prompts = Prompts.of_labels(torch.tensor([0, 1, -1]))
    if attend is not None:
        prompts = Prompts(prompts.labels, torch.randint(1, 4, (3, 3, 1)), torch.tensor([3, 1, 2]))
    ids = torch.randint(0, 11, (3, layout().length, 1))
    with torch.no_grad():
        nll = prior.nll(Tokens.fixed(ids), prompts)
        for begun in (0, 5, 9):
            state = prior.begin(prompts, Tokens.fixed(ids[:, :begun]), layout().length)
            for place in range(begun, layout().length):
                logits = prior.logits(state, ids[:, place, :0])
                found = torch.nn.functional.cross_entropy(logits, ids[:, place, 0], reduction="none")
                assert torch.allclose(found, nll[:, place, 0], atol=1e-4)
                prior.advance(state, ids[:, place])
        part = prior.nll(Tokens.fixed(ids[:, :7]), prompts)
    assert torch.allclose(part, nll[:, :7], atol=1e-4)
    if attend is None:
        drawn = sample(prior, prompts, SamplingConfig(guidance=1.5), [1, 2, 3])
        assert torch.equal(sample(prior, prompts[1:2], SamplingConfig(guidance=1.5), [2]).ids, drawn.ids[1:2])


def test_averages_of_streams_grow_with_the_cache():
    coder = codec(side=16)
    tokens = coder.encode(smooth(2).float() / 127.5 - 1)
    assert int(tokens.lengths.max()) > 300  # more than the first cache holds
    prior = toys.prior(coder.layout, averaging="mix", max_length=2048)
    prompts = Prompts.of_labels(torch.tensor([0, 1]))
    length = int(tokens.lengths.min())
    with torch.no_grad():
        nll = prior.nll(tokens, prompts)
        state = prior.begin(prompts, tokens.prefix(200), 2048)
        for place in range(200, min(length, 300)):
            logits = prior.logits(state, tokens.ids[:, place, :0])
            found = torch.nn.functional.cross_entropy(logits, tokens.ids[:, place, 0], reduction="none")
            assert torch.allclose(found, nll[:, place, 0], atol=2e-3)
            prior.advance(state, tokens.ids[:, place])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"averaging": "ema"}, "averaging='ema'; allowed: none, replace, mix, learned"),
        ({"averaging": "mix", "averaging_borders": "row"}, "averaging_borders='row'; allowed: sample, scale, grid"),
        ({"averaging": "learned", "averaging_borders": "grid"}, "set prior.averaging_borders=scale or sample"),
        ({"averaging": "mix", "averaging_longest": 99}, "averaging_longest=99; allowed: 2 to 23"),
        ({"averaging": "mix", "averaging_longest": 1}, "averaging_longest=1; allowed: 2 to"),
    ],
)
def test_averages_that_cannot_be(keys, message):
    with pytest.raises(ValueError, match=message):
        build_prior(TransformerPriorConfig(depth=1, width=32, heads=4, **keys), ClassConditionConfig(), layout(), ["a"])


def test_streams_and_scales_without_a_grid_have_fewer_borders():
    with pytest.raises(ValueError, match="scales of streams have no fixed place; allowed: sample"):
        segments_of(codec().layout, 1, 100, "scale")
    flat = TokenLayout((Scale("s", 4, None, 0, (Field("code", 5),), (4, 4)),))
    with pytest.raises(ValueError, match="the scale s has no grid; allowed: sample, scale"):
        segments_of(flat, 1, 4, "grid")
    assert segments_of(flat, 1, 4, "scale") == [Segment(0, 1, 4)]
