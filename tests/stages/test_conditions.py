"""Captions and classes as conditions: masking, the empty caption, condition dropout and guidance."""

import numpy as np
import pytest
import torch

from stages.conditions.text import ClassTextConditionConfig, TextConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.transformer import TransformerPriorConfig
from stages.weights import load_prior, save_prior
from tests.stages.test_prior import tokens
from tests.stages.toys import layout, same_weights

STATES = {"encoder": "toy", "max_tokens": 5, "width": 6, "empty_length": 2}
WORDS = {"encoder": "words", "max_tokens": 5, "width": 0, "empty_length": 0, "vocabulary": ["a", "b", "c"]}
KINDS = [(attend, spec) for attend in ("prefix", "cross") for spec in (STATES, WORDS)]


def text_prior(attend="prefix", spec=STATES, both=False, seed=0, **keys):
    torch.manual_seed(seed)
    condition = (ClassTextConditionConfig if both else TextConditionConfig)(attend=attend)
    config = TransformerPriorConfig(**{"depth": 2, "width": 32, "heads": 4, "dropout": 0.0, **keys})
    model = build_prior(config, condition, layout(), ["x", "y"] if both else [], spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if spec is STATES:
        model.condition.set_empty(np.random.default_rng(0).normal(size=(2, 6)).astype(np.float16))
    return model.eval()


def prompts(spec=STATES, lengths=(3, 1, 0), longest=4, labels=(-1, -1, -1), seed=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), longest, spec["width"] or 1)
    text = torch.randn(shape, generator=generator) if spec["width"] else torch.randint(4, shape, generator=generator)
    return Prompts(torch.tensor(labels), text, torch.tensor(lengths))


@pytest.mark.parametrize(("attend", "spec"), KINDS)
def test_what_lies_behind_a_captions_end_does_not_matter(attend, spec):
    model, sample_ = text_prior(attend, spec), tokens(layout())
    given = prompts(spec)
    other = prompts(spec, longest=5, seed=4)
    for row, length in enumerate(given.text_lengths.tolist()):
        other.text[row, :length] = given.text[row, :length]
    nll = model.nll(sample_, given)
    assert torch.equal(nll, model.nll(sample_, other))
    other.text[0, 2] = prompts(spec, seed=9).text[0, 2] + 1 if spec["width"] else (other.text[0, 2] + 1) % 4
    changed = model.nll(sample_, other)
    assert not torch.equal(nll[0], changed[0]) and torch.equal(nll[1:], changed[1:])


@pytest.mark.parametrize("attend", ["prefix", "cross"])
def test_no_text_is_the_empty_caption(attend):
    model, sample_ = text_prior(attend), tokens(layout())
    without = model.nll(sample_, Prompts.of_labels(torch.full((3,), -1)))
    empty = model.condition.empty.expand(3, -1, -1)
    assert torch.equal(without, model.nll(sample_, Prompts(torch.full((3,), -1), empty, torch.full((3,), 2))))
    assert torch.equal(without, model.nll(sample_, prompts().without()))
    model.condition.set_empty(np.zeros((2, 6), np.float16))
    assert not torch.equal(without, model.nll(sample_, prompts().without()))


@pytest.mark.parametrize(("attend", "spec"), KINDS)
def test_cached_logits_equal_the_full_pass(attend, spec):
    model, sample_, given = text_prior(attend, spec), tokens(layout()), prompts(spec)
    full = model.nll(sample_, given)
    state = model.begin(given, sample_.prefix(4), 12)
    for position in range(4, 12):
        element = sample_.ids[:, position]
        logits = model.logits(state, element[:, :0])
        nll = -logits.log_softmax(-1).gather(1, element[:, :1])[:, 0]
        torch.testing.assert_close(nll, full[:, position, 0], atol=1e-5, rtol=1e-5)
        model.advance(state, element)


def test_recomputing_blocks_changes_nothing_with_a_memory():
    gradients = []
    for recompute in (False, True):
        model = text_prior("cross", checkpoint_gradients=recompute).train()
        model.nll(tokens(layout()), prompts()).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attend", ["prefix", "cross"])
def test_class_and_text_both_count_and_each_may_be_missing(attend):
    model, sample_ = text_prior(attend, both=True), tokens(layout())
    given = prompts(labels=(0, 1, 0))
    nll = model.nll(sample_, given)
    for changed in (given.without(True, False), given.without(False, True), given.without()):
        assert not torch.equal(nll[:2], model.nll(sample_, changed)[:2])


def test_dropping_takes_the_given_share_and_leaves_nothing_of_a_caption():
    many = Prompts.cat([prompts(lengths=(2, 2, 2), labels=(0, 1, 0))] * 1000)
    torch.manual_seed(0)
    dropped = text_prior().condition.drop(many)
    assert abs((dropped.text_lengths == 0).float().mean() - 0.1) < 0.02
    both = text_prior(both=True).condition.drop(many)
    label, text = both.labels < 0, both.text_lengths == 0
    # each alone is dropped with 0.1, and both together with 0.1
    for share, expected in ((label, 0.19), (text, 0.19), (label & text, 0.1 + 0.9 * 0.01)):
        assert abs(share.float().mean() - expected) < 0.025


def test_guidance_of_zero_is_the_empty_caption():
    model, given = text_prior("cross"), prompts()
    seeds = range(3)
    unconditional = sample(model, given.without(), SamplingConfig(), seeds).ids
    assert torch.equal(sample(model, given, SamplingConfig(guidance=0.0), seeds).ids, unconditional)
    assert not torch.equal(sample(model, given, SamplingConfig(), seeds).ids[:2], unconditional[:2])


@pytest.mark.parametrize(("attend", "spec"), KINDS)
def test_saved_and_loaded_is_the_same(tmp_path, attend, spec):
    model, path = text_prior(attend, spec, both=True), tmp_path / "prior.safetensors"
    save_prior(path, model, model.config, model.condition_config, {})
    loaded, _ = load_prior(path)
    given = prompts(spec, labels=(0, -1, 1))
    assert loaded.text == spec and same_weights(loaded, model)
    torch.testing.assert_close(loaded.nll(tokens(layout()), given), model.nll(tokens(layout()), given))


def test_prompts_one_after_the_other_keep_their_rows():
    plain, long = Prompts.of_labels(torch.tensor([1])), prompts()
    joined = Prompts.cat([plain, long, prompts(longest=2, lengths=(2, 0, 1))])
    assert joined.labels.tolist() == [1] + [-1] * 6 and joined.text_lengths.tolist() == [0, 3, 1, 0, 2, 0, 1]
    assert torch.equal(joined[1:4].text, long.text) and joined.text.shape == (7, 4, 6)
    assert Prompts.cat([plain, plain]).text.shape[:2] == (2, 0)


def test_wrong_parts_are_named():
    with pytest.raises(ValueError, match="no caption states; set tokens.text_encoder"):
        text_prior(spec=None)
    with pytest.raises(ValueError, match="condition.attend='both'; allowed: prefix, cross"):
        text_prior(attend="both")
    with pytest.raises(
        ValueError, match="states of width 7 given to a prior that was trained with toy: 5 states of width 6"
    ):
        text_prior().nll(tokens(layout()), prompts({**STATES, "width": 7}))
    with pytest.raises(ValueError, match="captions of up to 9 states"):
        text_prior().nll(tokens(layout()), prompts(longest=9))
    with pytest.raises(ValueError, match="the empty caption has"):
        text_prior().condition.set_empty(np.zeros((3, 6), np.float16))
