"""Sampling: seeds, guidance, truncation, prefixes, early stop."""

import pytest
import torch

from data.layout import Tokens
from stages.contract import Prompts
from stages.prior.sampling import SamplingConfig, draw, guidance_at, sample
from tests.stages.test_prior import tokens
from tests.stages.toys import FixedPrior, layout, prior

LABELS = Prompts.of_labels(torch.tensor([0, 1, 2, 0, 1]))


def classes(count):
    return Prompts.of_labels(torch.zeros(count, dtype=torch.int64))


def test_one_seed_gives_one_image_whatever_the_batch():
    model, settings = prior(layout(num_fields=2)), SamplingConfig(guidance=1.5, top_k=[5], top_p=[0.9])
    together = sample(model, LABELS, settings, seeds=range(5)).ids
    for index in range(5):
        alone = sample(model, LABELS[index : index + 1], settings, seeds=[index]).ids
        assert torch.equal(alone[0], together[index])
    assert not torch.equal(together, sample(model, LABELS, settings, seeds=range(5, 10)).ids)


def test_guidance_of_one_is_the_conditional_model_and_zero_the_unconditional():
    model, none = prior(layout()), LABELS.without()
    plain = sample(model, LABELS, SamplingConfig(), seeds=range(5)).ids
    unconditional = sample(model, none, SamplingConfig(), seeds=range(5)).ids
    assert not torch.equal(plain, unconditional)
    assert torch.equal(sample(model, LABELS, SamplingConfig(guidance=0.0), seeds=range(5)).ids, unconditional)
    assert torch.equal(sample(model, none, SamplingConfig(guidance=3.0), seeds=range(5)).ids, unconditional)


def test_draws_follow_the_distribution():
    model = FixedPrior(layout(scales=1), [0.0, 1.0, 2.0] + [-30.0] * 8)
    ids = sample(model, classes(3000), SamplingConfig(), seeds=range(3000)).ids
    share = torch.bincount(ids.flatten(), minlength=11)[:3] / ids.numel()
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.02, rtol=0)


def test_guidance_moves_the_odds_as_the_formula_says():
    conditional, unconditional = [2.0, 0.0] + [-30.0] * 9, [1.0, 0.0] + [-30.0] * 9
    model = FixedPrior(layout(scales=1), conditional, unconditional)
    ids = sample(model, classes(4000), SamplingConfig(guidance=0.5), seeds=range(4000)).ids
    assert abs((ids == 0).double().mean() - torch.sigmoid(torch.tensor(1.5))) < 0.01


def test_schedules_rise_from_one():
    for schedule in ("linear", "cosine"):
        settings = SamplingConfig(guidance=3.0, guidance_schedule=schedule)
        values = [guidance_at(settings, position, 64) for position in range(64)]
        assert values[0] == 1 and values[-1] == pytest.approx(3) and values == sorted(values)
    assert guidance_at(SamplingConfig(guidance=3.0), 0, 64) == 3


def test_truncation_keeps_what_it_should():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(1000, 1).double()
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert set(draw(logits, noise, SamplingConfig(top_k=[2]), 0).tolist()) == {0, 1}
    assert set(draw(logits, noise, SamplingConfig(top_p=[0.7]), 0).tolist()) == {0, 1}  # 0.64 + 0.23
    assert set(draw(logits, noise, SamplingConfig(top_p=[0.1]), 0).tolist()) == {0}
    assert set(draw(logits, noise, SamplingConfig(top_k=[1]), 0).tolist()) == {0}
    assert set(draw(logits, noise, SamplingConfig(temperature=[0.0]), 0).tolist()) == {0}
    assert set(draw(logits, noise, SamplingConfig(temperature=[1.0, 0.0]), 1).tolist()) == {0}
    almost_one = torch.full((1,), 1 - 1e-16, dtype=torch.float64)
    assert draw(logits[:1], almost_one, SamplingConfig(top_k=[2]), 0).item() == 1


def test_a_forced_prefix_stays_and_decides_what_follows():
    model = prior(layout())
    forced = tokens(layout(), batch=5).prefix(4)
    ids = sample(model, LABELS, SamplingConfig(), range(5), prefix=forced).ids
    assert torch.equal(ids[:, :4], forced.ids)
    assert not torch.equal(ids[:, 4:], sample(model, LABELS, SamplingConfig(), range(5)).ids[:, 4:])
    whole = tokens(layout(), batch=5)
    assert torch.equal(sample(model, LABELS, SamplingConfig(), range(5), prefix=whole).ids, whole.ids)


def test_kept_elements_stay_and_the_others_follow_what_stands_before_them():
    model, known = prior(layout()), tokens(layout(), batch=5)
    keep = torch.zeros(5, 12, dtype=torch.bool)
    keep[:, :4] = True
    kept = sample(model, LABELS, SamplingConfig(guidance=2.0), range(5), known=known, keep=keep).ids
    assert torch.equal(kept, sample(model, LABELS, SamplingConfig(guidance=2.0), range(5), prefix=known.prefix(4)).ids)
    keep[:, 7] = True
    some = sample(model, LABELS, SamplingConfig(), range(5), known=known, keep=keep).ids
    without = sample(model, LABELS, SamplingConfig(), range(5), prefix=known.prefix(4)).ids
    assert torch.equal(some[keep], known.ids[keep]) and torch.equal(some[:, :7], without[:, :7])
    assert not torch.equal(some[:, 8:], without[:, 8:])
    assert torch.equal(sample(model, LABELS, SamplingConfig(), range(5), known=known, keep=keep | True).ids, known.ids)


def test_the_reversed_order_draws_with_each_scales_settings_and_keeps_what_it_should():
    model = prior(layout(), order="reversed")
    prompts = Prompts.of_labels(torch.tensor([0, 1]))
    greedy = SamplingConfig(guidance=1.0, temperature=[0.0, 1.0, 1.0])  # greedy in the coarsest scale, which comes last
    first, second = (sample(model, prompts, greedy, seeds).ids for seeds in ([0, 1], [0, 1]))
    assert torch.equal(first, second)
    nll = model.nll(Tokens.fixed(first), prompts)[:, :4, 0].detach()
    for row in range(2):  # no other id of any of its elements is more likely
        for place in range(4):
            others = first[row : row + 1].repeat(11, 1, 1)
            others[:, place, 0] = torch.arange(11)
            likely = model.nll(Tokens.fixed(others), Prompts.of_labels(prompts.labels[row].repeat(11)))[
                :, place, 0
            ].detach()
            assert float(nll[row, place]) == pytest.approx(float(likely.min()), abs=1e-4)
    known = Tokens.fixed(torch.zeros_like(first))
    keep = torch.zeros(first.shape[:2], dtype=torch.bool)
    keep[:, 2:6] = True
    made = sample(model, prompts, SamplingConfig(guidance=1.0), [0, 1], known=known, keep=keep).ids
    assert (made[:, 2:6] == 0).all() and (made[:, 6:] != 0).any()


def test_what_is_kept_must_fit():
    known = tokens(layout(), batch=5)
    with pytest.raises(ValueError, match="given together"):
        sample(prior(layout()), LABELS, SamplingConfig(), range(5), known=known)
    with pytest.raises(ValueError, match=r"places \(5, 8\); allowed: \(5, 12\)"):
        sample(prior(layout()), LABELS, SamplingConfig(), range(5), known=known, keep=torch.ones(5, 8).bool())


@pytest.mark.parametrize("scales", [1, 2])
def test_early_stop_costs_only_its_tokens_and_gives_the_same_ones(scales):
    model = FixedPrior(layout(), [0.0] * 11)
    sample(model, LABELS, SamplingConfig(scales=scales), range(5))
    assert len(model.seen) == 4 * scales
    model = prior(layout())
    for schedule in ("constant", "linear", "cosine"):
        keys = {"guidance": 4.0, "guidance_schedule": schedule}
        full = sample(model, LABELS, SamplingConfig(**keys), range(5)).ids
        part = sample(model, LABELS, SamplingConfig(**keys, scales=scales), range(5)).ids
        assert torch.equal(part, full[:, : 4 * scales])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SamplingConfig(top_p=[0.0]), "top_p"),
        (SamplingConfig(top_k=[1, 2]), "has 2 values; allowed: 1, or 3"),
        (SamplingConfig(temperature=[-1.0]), "temperature"),
        (SamplingConfig(guidance=float("nan")), "a finite number"),
        (SamplingConfig(scales=4), "allowed: 1 to 3"),
        (SamplingConfig(guidance_schedule="square"), "guidance_schedule"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(prior(layout()), LABELS, settings, range(5))


@pytest.mark.slow
def test_the_compiled_step_draws_the_same_tokens(tmp_path, monkeypatch):
    # PyTorch's own cache also returns code that was compiled for other CPU instructions, which then gives NaN
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = prior(layout())
    expected = sample(model, LABELS, SamplingConfig(guidance=2.0), range(5)).ids
    model.compile_step()
    assert torch.equal(sample(model, LABELS, SamplingConfig(guidance=2.0), range(5)).ids, expected)


def test_sampling_leaves_the_model_and_the_global_generator_alone():
    model = prior(layout(), dropout=0.5).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = sample(model, LABELS, SamplingConfig(), range(5)).ids
    assert model.training and torch.equal(torch.rand(1), expected)
    assert torch.equal(first, sample(model, LABELS, SamplingConfig(), range(5)).ids)
