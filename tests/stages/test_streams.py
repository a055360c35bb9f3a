"""The prior over streams: full pass and steps, the grammar, prefixes of unequal length, and measures."""

import math

import pytest
import torch

from data.images.views import to_float
from data.layout import Tokens
from stages.codecs.bitplane import BitplaneCodec, BitplaneConfig
from stages.conditions.labels import ClassConditionConfig
from stages.contract import FORBIDDEN, Prompts
from stages.factory import build_prior
from stages.measures.codes import code_use
from stages.measures.streams import measure_streams
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.transformer import TransformerPriorConfig
from stages.scales import scale_ids

LABELS = torch.tensor([0, 1, 2, 0, -1])
PROMPTS = Prompts.of_labels(LABELS)
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module", params=["blocks", "zerotree"])
def codec(request):
    made = BitplaneCodec(BitplaneConfig(variant=request.param, final_threshold=0.5), (8, 8), 1)
    made.fit([(images(), LABELS)])
    return made


def images():
    pixels = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return to_float((pixels * torch.tensor([1, 0.5, 0.1, 1, 0.02]).view(-1, 1, 1, 1)).to(torch.uint8))


def prior(codec, **named):
    torch.manual_seed(0)
    config = TransformerPriorConfig(**{"depth": 2, "width": 32, "heads": 2, "dropout": 0.0} | named)
    made = build_prior(config, ClassConditionConfig(dropout=0.1), codec.layout, NAMES)
    for parameter in made.parameters():  # new weights are near zero and hardly depend on the input
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def draw(model, codec, settings=None, rows=slice(None), prefix=None):
    seeds = torch.arange(5)[rows].tolist()
    prefix = codec.start_prefix(LABELS, range(5)) if prefix is None else prefix
    return sample(model, PROMPTS[rows], settings or SamplingConfig(), seeds, prefix[rows])


def test_one_pass_says_what_single_steps_say(codec):
    model, tokens = prior(codec), codec.encode(images())
    with torch.no_grad():
        nll = model.nll(tokens, PROMPTS)
        state = model.begin(PROMPTS, tokens.prefix(2), model.max_length)
        for position in range(2, tokens.ids.shape[1]):
            chosen = (
                model.logits(state, tokens.ids[:, position, :0]).log_softmax(-1).gather(-1, tokens.ids[:, position])
            )
            counts = position < tokens.lengths
            torch.testing.assert_close(-chosen[counts, 0], nll[counts, position, 0], atol=1e-4, rtol=1e-4)
            ended = model.ended(state, len(codec.layout.scales))
            assert torch.equal(ended, ~counts)
            model.advance(state, tokens.ids[:, position])
    assert (nll[~tokens.counted] == 0).all()


def test_streams_without_elements_go_through_every_layer_and_weight(codec):
    model, tokens = prior(codec), codec.encode(images()).prefix(0)
    passed = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: passed.append(1))
    output = model(tokens, PROMPTS)
    assert output.nll.shape == (5, 0, 1) and len(passed) == 2
    output.nll.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_only_what_stays_open_costs_bits(codec):
    model, tokens = prior(codec), codec.encode(images())
    tokens.notes = codec.grammar.annotate(tokens)
    output = model(tokens, PROMPTS)
    allowed = codec.grammar.allowed(tokens.notes, tokens.ids[..., :0])
    with torch.no_grad():  # computed by hand, step by step
        state = model.begin(PROMPTS, tokens.prefix(0), model.max_length)
        for position in range(20):
            logits = model.logits(state, tokens.ids[:, 0, :0])
            possible = logits.masked_fill(~allowed[:, position], -math.inf).log_softmax(-1)
            counts = position < tokens.lengths
            wanted = -possible.gather(-1, tokens.ids[:, position])[:, 0]
            torch.testing.assert_close(output.nll[counts, position, 0], wanted[counts], atol=1e-4, rtol=1e-4)
            assert (logits[~allowed[:, position]] == FORBIDDEN).all()
            model.advance(state, tokens.ids[:, position])
    assert ((output.illegal >= 0) & (output.illegal <= 1)).all() and output.illegal.sum() > 0
    torch.testing.assert_close(1 - output.illegal, torch.exp(-output.legal_nll))
    ruled_out = (codec.grammar.allowed(tokens.notes, tokens.ids[..., :0], False) & ~allowed).any(-1) & tokens.counted
    assert ruled_out.any() and (output.saved[ruled_out] > 0).all()
    assert output.saved[~ruled_out].abs().max() < 1e-5


def test_the_past_is_seen_and_the_future_is_not(codec):
    model, tokens = prior(codec), codec.encode(images())
    half = int(tokens.lengths[0]) // 2
    whole = model.nll(tokens, PROMPTS)
    torch.testing.assert_close(model.nll(tokens.prefix(half), PROMPTS), whole[:, :half], atol=1e-5, rtol=1e-4)
    alone = model.nll(tokens[2:3], PROMPTS[2:3])[:, : int(tokens.lengths[2])]
    torch.testing.assert_close(alone, whole[2:3, : int(tokens.lengths[2])], atol=1e-5, rtol=1e-4)
    # header, class and early tokens influence later elements
    late = slice(half, int(tokens.lengths[0]))
    for other in (
        model.nll(tokens[0:1], Prompts.of_labels(torch.tensor([1]))),
        model.nll(
            Tokens(tokens.ids[:1], tokens.lengths[:1], tokens.header[:1] * 0, codec.grammar.annotate(tokens[:1])),
            PROMPTS[:1],
        ),
    ):
        assert (other[0, late] - whole[0, late]).abs().max() > 1e-3


def test_without_context_neighbours_are_not_told(codec):
    tokens = codec.encode(images())
    tokens.notes = codec.grammar.annotate(tokens)
    changed = Tokens(tokens.ids, tokens.lengths, tokens.header, tokens.notes.clone())
    changed.notes[..., 4:] = 0
    for context in (True, False):
        model = prior(codec, context=context)
        same = torch.allclose(model.nll(tokens, PROMPTS), model.nll(changed, PROMPTS))
        assert same == (not context)


def test_samples_are_complete_legal_streams_whatever_the_batch(codec):
    model = prior(codec)
    tokens = draw(model, codec)
    state = codec.grammar.start(tokens.header)
    for position in range(tokens.ids.shape[1]):
        assert torch.equal(state.going, position < tokens.lengths)
        codec.grammar.advance(state, tokens.ids[:, position])
    assert not state.going.any() and codec.decode(tokens).isfinite().all()
    for row in range(5):
        alone = draw(model, codec, rows=slice(row, row + 1))
        assert torch.equal(alone.ids[0, : alone.lengths[0]], tokens.ids[row, : tokens.lengths[row]])
    settings = [SamplingConfig(guidance=weight, top_k=[2]) for weight in (0.0, 1.0, 4.0)]
    without, plain, guided = (draw(model, codec, each) for each in settings)
    assert not torch.equal(guided.ids, plain.ids)
    codec.decode(guided)
    # guidance 0 ignores the class
    start = codec.start_prefix(LABELS, range(5))
    none = sample(model, Prompts.of_labels(torch.full((5,), -1)), SamplingConfig(top_k=[2]), range(5), start)
    assert torch.equal(without.ids, none.ids)


def test_the_cache_grows(codec, monkeypatch):
    model = prior(codec)
    whole = draw(model, codec)
    monkeypatch.setattr("stages.prior.transformer.FIRST_SLOTS", 2)
    assert torch.equal(draw(model, codec).ids, whole.ids)


def test_stopping_at_a_plane_is_the_beginning_of_the_whole(codec):
    model = prior(codec)
    whole = draw(model, codec)
    for k in (2, len(codec.layout.scales) - 1):
        part, wanted = draw(model, codec, SamplingConfig(scales=k)), codec.first_scales(whole, k)
        assert torch.equal(part.lengths, wanted.lengths)
        assert torch.equal(part.ids[part.counted], wanted.ids[wanted.counted])


def test_prefixes_of_unequal_length_are_kept(codec, monkeypatch):
    model, tokens = prior(codec), codec.encode(images())
    prefix = codec.first_scales(tokens, len(codec.layout.scales) - 1)
    assert len(set(prefix.lengths.tolist())) > 1
    ends = [sample(model, PROMPTS, SamplingConfig(), [seed] * 5, prefix) for seed in (1, 2)]
    for end in ends:
        for row in range(5):
            kept = int(prefix.lengths[row])
            assert torch.equal(end.ids[row, :kept], tokens.ids[row, :kept])
        codec.decode(end)
    assert not torch.equal(ends[0].ids[:, : ends[1].ids.shape[1]], ends[1].ids[:, : ends[0].ids.shape[1]])
    # a row does not depend on the prefix lengths of other rows
    monkeypatch.setattr("stages.prior.sampling.NOISE_CHUNK", 4)
    for settings in (SamplingConfig(), SamplingConfig(guidance=2.0)):
        together = sample(model, PROMPTS, settings, range(5), prefix)
        for row in range(5):
            one = prefix[row : row + 1].prefix(int(prefix.lengths[row]))
            alone = sample(model, PROMPTS[row : row + 1], settings, [row], one)
            assert torch.equal(alone.ids[0, : alone.lengths[0]], together.ids[row, : together.lengths[row]])


def test_a_full_prefix_and_empty_streams_are_no_trouble(codec):
    model, tokens = prior(codec, max_length=20), codec.encode(images())
    full = tokens.prefix(20)
    assert torch.equal(sample(model, PROMPTS, SamplingConfig(), range(5), full).ids, full.ids)
    black = codec.encode(torch.full((2, 1, 8, 8), -1.0))
    output = model(black, PROMPTS[:2])
    assert output.nll.shape == (2, 0, 1)
    (output.nll.sum() + output.legal_nll.sum()).backward()
    found = measure_streams(codec.grammar, len(codec.layout.scales), black, torch.ones(2), 1, model, PROMPTS[:2])
    assert found["prior_bits"] == found["uniform_bits"] == 1
    drawn = sample(model, PROMPTS[:2], SamplingConfig(), [0, 1], black)
    assert drawn.lengths.tolist() == [0, 0]


def test_a_cap_cuts_streams_to_legal_beginnings(codec):
    model, tokens = prior(codec, max_length=20), codec.encode(images())
    assert model.max_length == 20
    nll = model.nll(tokens, PROMPTS)
    assert nll.shape[1] == 20
    drawn = draw(model, codec)
    assert int(drawn.lengths.max()) == 20 and codec.decode(drawn).isfinite().all()
    found = measure_streams(codec.grammar, len(codec.layout.scales), tokens, torch.zeros(5), 2, model, PROMPTS)
    assert found["cut_share"] == float((tokens.lengths > 20).double().mean()) > 0
    assert found["prior_bits"] is None and found["prefixes"][0]["prior_bits"] is not None
    short = measure_streams(
        codec.grammar, len(codec.layout.scales), tokens.prefix(20), torch.zeros(5), 2, model, PROMPTS
    )
    assert found["illegal_probability"] == pytest.approx(short["illegal_probability"])


def test_gradients_reach_everything_and_checkpoints_change_nothing(codec):
    tokens = codec.encode(images())
    losses = []
    for recompute in (False, True):
        model = prior(codec, checkpoint_gradients=recompute).train()
        output = model(tokens, PROMPTS)
        (output.nll.sum() + output.legal_nll.sum()).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        losses.append((output.nll.sum(), model.inputs.element.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


def test_measures_add_up(codec):
    model, tokens = prior(codec), codec.encode(images())
    header = torch.full((5,), 3.0)
    with torch.no_grad():
        nll = model.nll(tokens, PROMPTS)
    found = measure_streams(codec.grammar, len(codec.layout.scales), tokens, header, 2, model, PROMPTS)
    assert found["prior_bits"] == pytest.approx(3 + float(nll.sum()) / math.log(2) / 5, rel=1e-5)
    assert found["mean_length"] == pytest.approx(found["prefixes"][-1]["tokens"])
    rates = [entry["prior_bits"] for entry in found["prefixes"]]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(found["prior_bits"])
    # by hand: every token costs log2 of the number of allowed ids
    notes, by_hand = codec.grammar.annotate(tokens), 0.0
    for row in range(5):
        for position in range(int(tokens.lengths[row])):
            by_hand += math.log2(int(codec.grammar.allowed(notes[row, position], notes[row, position, :0]).sum()))
    assert found["uniform_bits"] == pytest.approx(3 + by_hand / 5)
    assert found["uniform_bits_saved"] > 0 and found["prior_bits_saved"] > 0
    assert sum(use.num_tokens for use in code_use(tokens, codec.layout)) == int(tokens.lengths.sum())
    scales = scale_ids(tokens, codec.layout)
    assert torch.equal(scales[tokens.counted], codec.grammar.reached(notes)[tokens.counted])


def test_what_a_stream_needs_is_asked_for(codec):
    model = prior(codec)
    with pytest.raises(ValueError, match="a prefix that carries its header"):
        sample(model, PROMPTS, SamplingConfig(), range(5))
    with pytest.raises(ValueError, match="sampling.top_k has 4 values; allowed: 1 for streams"):
        draw(model, codec, SamplingConfig(top_k=[2] * 4))
    with pytest.raises(ValueError, match="guidance_schedule=linear: the length of a stream is not known"):
        draw(model, codec, SamplingConfig(guidance=2.0, guidance_schedule="linear"))
    with pytest.raises(ValueError, match="begins with its header"):
        model.begin(PROMPTS, None, 10)
    known = codec.encode(images())
    with pytest.raises(ValueError, match="in layouts of fixed length"):
        prefix = codec.start_prefix(LABELS, range(5))
        sample(model, PROMPTS, SamplingConfig(), range(5), prefix, known, torch.ones(5, 3, dtype=torch.bool))
