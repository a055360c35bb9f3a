"""The prior over lists: chunks and their past, cached steps against the full pass, orders, and illegal elements."""

from functools import partial

import pytest
import torch

from data.layout import Tokens
from stages.conditions.labels import ClassConditionConfig, NoConditionConfig
from stages.conditions.text import TextConditionConfig
from stages.contract import FORBIDDEN, Prompts
from stages.factory import build_grammar, build_prior
from stages.measures.memory import saved_bytes
from stages.prior.chunked import ChunkedPriorConfig
from stages.prior.dense import DenseImage
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.transformer import TransformerPriorConfig
from stages.scales import keep_scales, scale_ids
from tests.stages import toys
from tests.stages.dct_lists import chunked, codec, noise

PROMPTS = Prompts.of_labels(torch.tensor([0, 1, -1, 1]))
SMALL = {"width": 32, "heads": 4, "encoder_depth": 1, "channel_depth": 1, "position_depth": 1, "value_depth": 1}
KINDS = [("natural", 1), ("natural", 3), ("luma_first", 3)]


def made(channels, size=(16, 16), **keys):
    coder = codec(size, channels=channels, block=4, quality=30, **keys)
    coder.fit([(noise(6, size, channels), torch.zeros(6))])
    return coder, coder.encode(noise(4, size, channels, seed=1))


@pytest.mark.parametrize(("order", "channels"), KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_cached_steps_equal_the_full_pass(order, channels, chunk):
    coder, tokens = made(channels, (8, 8))
    assert tokens.lengths[2] > 5 and tokens.lengths[3] > 9 + 3 * 7  # several chunks, except for the longest chunk size
    prior = chunked(coder.layout, order=order, chunk=chunk)
    with torch.no_grad():
        full = prior(tokens, PROMPTS)
        arranged, taken = prior.grammar.sort(tokens)
        for row, cut in ((3, 0), (3, 9), (2, 5), (0, 0)):
            one, length = arranged[row : row + 1], int(tokens.lengths[row])
            state = prior.begin(PROMPTS[row : row + 1], one.prefix(cut), coder.layout.length)
            for place in range(cut, length):
                element = one.ids[:, place]
                for field in range(3):
                    logits = prior.logits(state, element[:, :field])
                    wanted = full.nll[row, taken[row, place], field]
                    assert torch.allclose(-logits.log_softmax(-1)[0, element[0, field]], wanted, atol=2e-4)
                prior.advance(state, element)
            assert prior.ended(state, len(coder.layout.scales)).all()


def test_a_step_may_skip_the_logits():
    """Forced elements need no logits, but the decoders must still see them."""
    coder, tokens = made(3)
    prior = chunked(coder.layout)
    one = tokens[3:4]
    with torch.no_grad():
        asked = prior.begin(PROMPTS[:1], one.prefix(3), coder.layout.length)
        silent = prior.begin(PROMPTS[:1], one.prefix(3), coder.layout.length)
        for place in range(3, 12):
            for field in range(3):
                prior.logits(asked, one.ids[:, place, :field])
            prior.advance(asked, one.ids[:, place])
            prior.advance(silent, one.ids[:, place])
        nothing = one.ids[:, 0, :0]
        assert torch.allclose(prior.logits(asked, nothing), prior.logits(silent, nothing), atol=1e-5)


def test_the_decoders_keep_as_much_whatever_the_size_of_the_image():
    """Full chunks, long enough for the fused kernel, which stores no matrix of all pairs."""
    kept = []
    for side in (32, 64):
        coder = codec((side, side), quality=90)
        tokens = coder.encode(noise(2, (side, side))[1:])
        assert tokens.ids.shape[1] > 500
        found = {}
        for chunk in (400, 100_000):
            sizes = {**SMALL, "chunk": min(chunk, tokens.ids.shape[1]), "overlap": 8, "early_bias": 1e3}
            prior = build_prior(ChunkedPriorConfig(**sizes), NoConditionConfig(), coder.layout, [])
            step = partial(prior, tokens, PROMPTS[:1].without())
            found[chunk] = saved_bytes(step, prior, prior.parts, {"decoders": "encoder"})
        kept.append(found)
    small, large = kept
    assert small[400]["decoders"] == large[400]["decoders"] > 0
    assert large[400]["encoder"] > 3 * small[400]["encoder"]
    assert large[100_000]["decoders"] > 2 * small[100_000]["decoders"] > small[400]["decoders"]


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, tokens, prompts):
            return self.second(self.first(tokens).exp())

    module, x = Two(), torch.randn(5, 8)
    found = saved_bytes(lambda: module(x, None), module, {"first": [module.first], "second": [module.second]})
    assert found == {
        "first": 5 * 8 * 4,
        "second": 0,
        "rest": 5 * 8 * 4,
    }  # exp saves its result, which second also needs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [2, 4])
def test_a_chunk_and_its_past_are_the_whole_list(channels, patch):
    coder, tokens = made(channels)
    dense = DenseImage(coder.grammar, patch)
    whole = dense(tokens)
    values = coder.to_values(tokens)
    assert whole.shape == (4, dense.num_patches, dense.width)
    assert torch.equal(whole.flatten(1).sort().values, values.float().sort().values)
    for start, stop in ((0, 7), (7, 14), (14, 1000)):
        past = dense(tokens.prefix(start))
        part = Tokens(tokens.ids[:, start:stop], (tokens.lengths - start).clamp(0, stop - start), tokens.header)
        after = dense(Tokens(tokens.ids[:, stop:], (tokens.lengths - stop).clamp(min=0), tokens.header))
        assert torch.equal(past + dense(part) + after, whole)
        assert not (past * dense(part)).any()


def test_patches_hold_the_blocks_of_one_place():
    coder = codec((32, 32))  # 4x4 luma blocks, 2x2 blocks of each chroma plane
    dense = DenseImage(coder.grammar, 2)
    assert dense.num_patches == 4 and dense.width == 4 * 64 + 2 * 64
    patches = torch.arange(4)
    assert torch.equal(dense.patch_of[1, :4], patches) and coder.grammar.plane_of[1] == 1
    assert dense.patch_of[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert dense.row_of[1, :4].tolist() == [0, 0, 2, 2] and dense.column_of[1, :4].tolist() == [0, 2, 0, 2]
    with pytest.raises(ValueError, match="patch=1; allowed: multiples of 2"):
        DenseImage(coder.grammar, 1)
    with pytest.raises(ValueError, match="patch=3; allowed: multiples of 2"):
        DenseImage(coder.grammar, 3)


@pytest.mark.parametrize(("order", "channels"), KINDS)
def test_illegal_continuations_have_no_probability(order, channels):
    """At random places of real lists: ids that the masks forbid are illegal, and all others are legal."""
    coder, tokens = made(channels)
    prior = chunked(coder.layout, order=order)
    arranged, generator = prior.to_own_order(tokens), torch.Generator().manual_seed(0)
    grammar = prior.grammar

    def legal(past, element):
        try:
            grammar.annotate(Tokens.fixed(torch.cat([past, torch.tensor([element])])[None]))
        except ValueError:
            return False
        return True

    for place in torch.randint(0, int(arranged.lengths[3]), (6,), generator=generator).tolist():
        past = arranged.ids[3, :place]
        with torch.no_grad():
            state = prior.begin(PROMPTS[:1], Tokens.fixed(past[None]), coder.layout.length)
            channels_, positions = grammar.end + 1, grammar.num_positions
            zero, some = coder.largest, coder.largest + 1
            may = (prior.logits(state, past.new_zeros(1, 0)) > FORBIDDEN / 2)[0].tolist()
            for channel in range(channels_):
                value = zero if channel == grammar.end else some
                fits = [legal(past, [channel, position, value]) for position in range(positions)]
                assert may[channel] == any(fits)
                if not may[channel]:
                    continue
                allowed = grammar.allowed(state.stream.notes, torch.tensor([[channel]]))[0].tolist()
                assert allowed == fits
                first = torch.tensor([[channel, fits.index(True)]])
                values = grammar.allowed(state.stream.notes, first)[0].tolist()
                assert values == [legal(past, [*first[0].tolist(), v]) for v in range(2 * zero + 1)]


@pytest.mark.parametrize(("order", "channels"), KINDS)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_what_is_sampled_is_a_list_and_does_not_depend_on_its_batch(order, channels, guidance):
    coder, _ = made(channels)
    prior = chunked(coder.layout, order=order)
    settings = SamplingConfig(guidance=guidance, temperature=[0.7])
    drawn = sample(prior, PROMPTS, settings, [3, 4, 5, 6])
    coder.grammar.annotate(drawn)  # raises unless it is in natural order
    ends = drawn.ids[torch.arange(4), drawn.lengths - 1, 0]
    assert (ends == coder.grammar.end).all() and len(set(drawn.lengths.tolist())) > 1
    for row in range(4):
        alone = sample(prior, PROMPTS[row : row + 1], settings, [3 + row])
        assert torch.equal(alone.ids[0], drawn.ids[row, : int(drawn.lengths[row])])


def test_prefixes_are_kept_and_closed_scales_stay_closed():
    coder, tokens = made(3)
    prior, tokens, prompts = chunked(coder.layout), tokens[2:], PROMPTS[2:]
    prefix = tokens.prefix(2)  # these scales could have many more elements
    assert (scale_ids(prefix, coder.layout)[prefix.counted] < 2).all()
    drawn = sample(prior, prompts, SamplingConfig(), range(2), prefix=prefix, whole=[0, 1])
    for row in range(2):
        length = int(prefix.lengths[row])
        assert torch.equal(drawn.ids[row, :length], prefix.ids[row, :length])
    first, given = coder.first_scales(drawn, 2), coder.first_scales(prefix, 2)
    assert torch.equal(first.lengths, given.lengths)
    # without ``whole``, these scales may get more elements
    hot = SamplingConfig(temperature=[4.0])
    free = [sample(prior, prompts, hot, range(s, s + 2), prefix=prefix) for s in range(0, 40, 2)]
    assert any((coder.first_scales(each, 2).lengths > given.lengths).any() for each in free)


def test_luma_first_writes_chroma_to_a_given_luma():
    coder, tokens = made(3)
    prior = chunked(coder.layout, order="luma_first")
    luma = [number for number, scale in enumerate(coder.layout.scales) if scale.planes == "luma"]
    prefix = keep_scales(tokens, coder.layout, luma)
    drawn = sample(prior, PROMPTS, SamplingConfig(), range(4), prefix=prefix, whole=luma)
    kept = keep_scales(drawn, coder.layout, luma)
    assert torch.equal(kept.lengths, prefix.lengths)
    assert torch.equal(
        kept.ids.masked_fill(~kept.counted[..., None], 0), prefix.ids.masked_fill(~prefix.counted[..., None], 0)
    )
    with pytest.raises(ValueError, match="luma_first writes other scales before these"):
        sample(prior, PROMPTS, SamplingConfig(), range(4), prefix=coder.first_scales(tokens, 2), whole=[0, 1])
    with pytest.raises(ValueError, match="natural writes other scales before these"):
        sample(chunked(coder.layout), PROMPTS, SamplingConfig(), range(4), prefix=prefix, whole=luma)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_prefixes_of_other_lengths_in_a_batch_change_nothing(guidance):
    coder, tokens = made(3)
    prior = chunked(coder.layout, order="luma_first")
    luma = [number for number, scale in enumerate(coder.layout.scales) if scale.planes == "luma"]
    prefix = keep_scales(tokens, coder.layout, luma)
    assert prefix.lengths[0] == 0 and len(set(prefix.lengths.tolist())) == 4
    settings = SamplingConfig(guidance=guidance)
    drawn = sample(prior, PROMPTS, settings, range(4), prefix=prefix, whole=luma)
    for row in range(4):
        mine = prefix[row : row + 1].prefix(int(prefix.lengths[row]))
        alone = sample(prior, PROMPTS[row : row + 1], settings, [row], prefix=mine, whole=luma)
        assert torch.equal(alone.ids[0], drawn.ids[row, : int(drawn.lengths[row])])


def test_sampling_stops_after_the_scales_asked_for():
    coder, _ = made(1)
    prior = chunked(coder.layout)
    whole = sample(prior, PROMPTS, SamplingConfig(), range(4))
    part = sample(prior, PROMPTS, SamplingConfig(scales=1), range(4))
    wanted = coder.first_scales(whole, 1)
    assert torch.equal(part.lengths, wanted.lengths) and torch.equal(part.ids, wanted.ids)


def test_training_judges_one_chunk_and_takes_early_ones_more_often():
    coder, tokens = made(1)
    tokens = tokens[3:4]
    length = int(tokens.lengths[0])
    assert length > 3 * 7
    for bias in (0.0, 2.0):
        prior = chunked(coder.layout, early_bias=bias)
        whole = prior(tokens, PROMPTS[:1])
        assert whole.judged is None and (whole.nll[0, :length] > 0).any(-1).all()
        prior.train()
        starts = torch.zeros(length)
        for seed in range(300):
            torch.manual_seed(seed)
            numbers = prior._drawn_chunks(tokens.lengths)
            starts[int(numbers) * 7] += 1
        counts = starts[::7] / 300
        weights = torch.arange(1, len(counts) + 1).float() ** -bias
        assert (counts - weights / weights.sum()).abs().max() < 0.1
        torch.manual_seed(1)
        output = prior(tokens, PROMPTS[:1])
        chosen = output.judged[0].nonzero()[:, 0]
        assert chosen[0] % 7 == 0 and len(chosen) == min(7, length - int(chosen[0]))
        assert torch.allclose(output.nll[0, chosen], whole.nll[0, chosen], atol=1e-4)
        assert not output.nll[~output.judged].any()


def test_a_header_is_seen():
    coder = codec(channels=1, overflow="lower")
    tokens = coder.encode(noise(4, channels=1))
    prior = chunked(coder.layout)
    before = prior.nll(tokens, PROMPTS)
    tokens.header += 1
    assert not torch.allclose(before, prior.nll(tokens, PROMPTS))
    tokens.header[1] = 9
    with pytest.raises(ValueError, match=r"lowered \[.*9.*\]; allowed: 0 to 5"):
        prior.nll(tokens, PROMPTS)
    with pytest.raises(ValueError, match="needs a prefix"):
        sample(prior, PROMPTS, SamplingConfig(), range(4))


def test_new_gates_are_closed():
    """With zero gates every decoder returns its input; the gradients of the gates are not zero."""
    coder, tokens = made(1)
    torch.manual_seed(0)
    config = ChunkedPriorConfig(width=32, heads=4, dropout=0.0, chunk=50, overlap=2)
    prior = build_prior(config, ClassConditionConfig(), coder.layout, ["a", "b"])
    x = torch.randn(2, 5, 32)
    memory = torch.randn(2, 3, 32)
    for decoder in prior.decoders:
        assert torch.equal(decoder(x, decoder.remember(memory), None), x)
    output = prior.train()(tokens, PROMPTS)
    (output.nll.sum() + output.legal_nll.sum()).backward()
    gates = [parameter.grad for name, parameter in prior.named_parameters() if name.endswith("gates")]
    assert len(gates) == 14 and all((grad != 0).any() for grad in gates)


def test_parts_that_do_not_fit_are_refused():
    coder, _ = made(1)
    plain = ClassConditionConfig()
    with pytest.raises(ValueError, match="set prior.kind=chunked"):
        build_prior(TransformerPriorConfig(depth=1, width=32, heads=4), plain, coder.layout, ["a"])
    with pytest.raises(ValueError, match="set prior.kind=transformer"):
        build_prior(ChunkedPriorConfig(), plain, toys.layout(), ["a"])
    for keys, message in (
        ({"order": "reversed"}, "order='reversed'; allowed for lists: natural, luma_first"),
        ({"heads": 5}, "no multiple"),
        ({"chunk": 0}, "chunk=0"),
        ({"overlap": 0}, "overlap=0"),
    ):
        with pytest.raises(ValueError, match=message):
            chunked(coder.layout, **keys)


def test_scales_of_lists_do_not_depend_on_order():
    coder, tokens = made(3)
    grammar = build_grammar(coder.layout, order="luma_first")
    sorted_, taken = grammar.sort(tokens)
    natural = scale_ids(tokens, coder.layout)
    assert torch.equal(scale_ids(sorted_, coder.layout, grammar), natural.gather(1, taken))


def test_without_classes_and_with_captions():
    coder, tokens = made(1)
    nothing = build_prior(ChunkedPriorConfig(**SMALL), NoConditionConfig(), coder.layout, [])
    assert nothing.eval().nll(tokens, PROMPTS.without()).isfinite().all()
    assert sample(nothing, PROMPTS.without(), SamplingConfig(temperature=[0.3]), range(4)).lengths.min() >= 1
    letters = [f"{number}" for number in range(20)]
    text = {"encoder": "words", "max_tokens": 5, "width": 0, "empty_length": 0, "vocabulary": letters}
    for attend in ("prefix", "cross"):
        torch.manual_seed(0)
        config = TextConditionConfig(attend=attend)
        prior = build_prior(ChunkedPriorConfig(**SMALL), config, coder.layout, [], text).eval()
        with torch.no_grad():
            for parameter in prior.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        words = torch.randint(1, 20, (4, 5, 1))
        lengths = torch.tensor([5, 2, 0, 3])
        prompts = Prompts(PROMPTS.labels * 0 - 1, words, lengths)
        before = prior.nll(tokens, prompts)
        behind = words.clone()
        behind[1, 2:] = words[1, 2:] % 19 + 1
        assert torch.equal(prior.nll(tokens, Prompts(prompts.labels, behind, lengths))[1], before[1])
        inside = words.clone()
        inside[1, :2] = words[1, :2] % 19 + 1
        changed = prior.nll(tokens, Prompts(prompts.labels, inside, lengths))
        assert not torch.allclose(changed[1], before[1]) and torch.allclose(changed[3], before[3])
