"""Grammar of bit-planes: legal and illegal streams, and the notes before each token."""

import numpy as np
import pytest
import torch

from data.images.views import to_float
from data.layout import TokenLayout, Tokens
from stages.codecs.scan import NEIGHBOURS
from stages.factory import build_grammar
from tests.stages.bitplanes import VARIANTS, codec, noise, smooth


def draw_streams(tokenizer, count, seed):
    """Complete legal streams; all allowed ids are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    header = torch.randint(0, tokenizer.planes + 1, (count, 1), generator=generator)
    state = tokenizer.grammar.start(header)
    ids, lengths = [], torch.zeros(count, dtype=torch.int64)
    while state.going.any():
        lengths += state.going
        allowed = tokenizer.grammar.allowed(state.notes, state.notes[:, :0]).float()
        ids.append(torch.multinomial(allowed, 1, generator=generator))
        tokenizer.grammar.advance(state, ids[-1])
    tokens = Tokens(torch.stack(ids, 1), lengths, header)
    tokens.ids.masked_fill_(~tokens.counted.unsqueeze(-1), 0)
    return tokens


@pytest.fixture(scope="module", params=VARIANTS)
def ten_thousand(request):
    tokenizer = codec(request.param, side=8, final_threshold=0.25)
    return tokenizer, draw_streams(tokenizer, 10_000, 1)


def test_ten_thousand_random_legal_streams(ten_thousand):
    tokenizer, tokens = ten_thousand
    values = tokenizer.decode_coefficients(tokens)
    again = tokenizer.encode_coefficients(values, tokens.header[:, 0].numpy())
    # the same header gives the same coefficients and, as nothing impossible was drawn, the same tokens
    assert np.array_equal(tokenizer.decode_coefficients(again), values)
    assert torch.equal(again.lengths, tokens.lengths) and torch.equal(again.ids, tokens.ids)
    cut = (tokens.lengths * torch.rand(10_000, generator=torch.Generator().manual_seed(2))).long()
    prefix = Tokens(tokens.ids, cut, tokens.header)
    assert tokenizer.decode(prefix).isfinite().all()
    # the whole vocabulary occurs
    assert tokens.ids[tokens.counted].unique().tolist() == list(range(len(tokenizer.grammar.names)))


def test_ten_thousand_corrupted_streams_are_refused_or_decode(ten_thousand):
    tokenizer, tokens = ten_thousand
    generator = np.random.default_rng(4)
    refused = 0
    for row in range(10_000):
        one = Tokens(
            tokens.ids[row : row + 1].clone(), tokens.lengths[row : row + 1].clone(), tokens.header[row : row + 1]
        )
        kind, length = row % 4, int(one.lengths)
        if kind == 0 and length:
            one.ids[0, generator.integers(length)] = int(generator.integers(-3, 300))
        elif kind == 1:
            one.lengths += int(generator.integers(-5, 5))
        elif kind == 2:
            one.header = one.header + int(generator.integers(-9, 9))
        else:
            one.ids = one.ids.roll(int(generator.integers(1, 9)), 1)
        try:
            decoded = tokenizer.decode(one)
        except ValueError:
            refused += 1
            continue
        assert decoded.shape == (1, 1, 8, 8) and decoded.isfinite().all()
    assert 5000 < refused < 10_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_illegal_streams_are_refused_at_their_first_offence(variant):
    tokenizer = codec(variant)
    tokens = tokenizer.encode(to_float(smooth(2)))
    place = int(tokens.lengths[1]) // 2
    notes = tokenizer.grammar.annotate(tokens)
    wrong = int((~tokenizer.grammar.allowed(notes[1, place], notes[1, place, :0])).nonzero()[0])
    broken = Tokens(tokens.ids.clone(), tokens.lengths, tokens.header)
    broken.ids[1, place] = wrong
    name = tokenizer.grammar.names[wrong]
    for refuses in (tokenizer.decode, tokenizer.grammar.annotate):
        with pytest.raises(ValueError, match=rf"stream 1: token {place} \({name}\) cannot stand there"):
            refuses(broken)
    state = tokenizer.grammar.start(tokens.header)
    with pytest.raises(ValueError, match=r"cannot come next"):
        tokenizer.grammar.advance(state, torch.full((2, 1), len(tokenizer.grammar.names) - 1))
    with pytest.raises(ValueError, match=rf"a stream of 99 bit-planes; allowed: 0 to {tokenizer.planes}"):
        tokenizer.decode(Tokens(tokens.ids, tokens.lengths, torch.full((2, 1), 99)))
    with pytest.raises(ValueError, match="lengths from"):
        tokenizer.decode(Tokens(tokens.ids, tokens.lengths + 10_000, tokens.header))


def test_an_empty_stream_is_black_and_may_not_go_on():
    tokenizer = codec()
    nothing = Tokens(
        torch.zeros(1, 0, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1).long()
    )
    assert (tokenizer.decode(nothing) == -1).all()
    more = Tokens(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64), nothing.header)
    with pytest.raises(ValueError, match="stream 0: token 0"):
        tokenizer.decode(more)


def after(tokenizer, names):
    """Names of the ids allowed after some tokens: (strict, not strict)."""
    state = tokenizer.grammar.start(torch.full((1, 1), tokenizer.planes))
    for name in names:
        tokenizer.grammar.advance(state, torch.tensor([[tokenizer.grammar.names.index(name)]]))
    return tuple(
        {
            tokenizer.grammar.names[i]
            for i in tokenizer.grammar.allowed(state.notes, state.notes[:, :0], strict)[0].nonzero()[:, 0]
        }
        for strict in (True, False)
    )


SIGNS = {"Positive", "Negative"}
ANY = {"Insignificant", *SIGNS}


@pytest.mark.parametrize(
    ("variant", "before", "strict", "loose"),
    [
        ("blocks", [], {"Group4x4", "Group2x2", *ANY}, {"Group4x4", "Group2x2", *ANY}),
        ("blocks", ["Group4x4"], {"Group4x4", "Group2x2", *ANY}, {"Group4x4", "Group2x2", *ANY}),
        ("blocks", ["Insignificant"], ANY, ANY),
        ("blocks", ["Insignificant"] * 3, SIGNS, ANY),
        ("blocks", ["Positive", *["Insignificant"] * 2], ANY, ANY),
        ("blocks", ["Group2x2"], {"Group2x2", *ANY}, {"Group2x2", *ANY}),
        ("blocks", ["Group2x2"] * 3, ANY, {"Group2x2", *ANY}),
        ("blocks", [*["Group2x2"] * 3, *["Insignificant"] * 3], SIGNS, ANY),
        # next plane: a found coefficient is refined, and a block that contains one guarantees no further one
        (
            "blocks",
            ["Positive", *["Insignificant"] * 3, *["Group2x2"] * 3, *["Group4x4"] * 3],
            *[{"Lower", "Upper"}] * 2,
        ),
        ("blocks", ["Positive", *["Insignificant"] * 3, *["Group2x2"] * 3, *["Group4x4"] * 3, "Lower"], ANY, ANY),
        (
            "blocks",
            ["Positive", *["Insignificant"] * 3, *["Group2x2"] * 3, *["Group4x4"] * 3, "Lower", *["Insignificant"] * 3]
            + ["Group2x2"] * 2,
            {"Group2x2", *ANY},
            {"Group2x2", *ANY},
        ),
        ("zerotree", [], ANY, ANY),
        ("zerotree", ["Insignificant"] * 4, {"ZeroTree", *ANY}, {"ZeroTree", *ANY}),
        # scaling coefficients guarantee nothing; the first detail has a significant descendant, the others do not
        ("zerotree", ["Insignificant"] * 5 + ["ZeroTree"] * 11, ANY, ANY),
        ("zerotree", ["Insignificant"] * 5 + ["ZeroTree"] * 11 + ["Insignificant"] * 3, SIGNS, ANY),
        ("zerotree", ["Insignificant"] * 5 + ["ZeroTree"] * 11 + ["Positive", *["Insignificant"] * 2], ANY, ANY),
        # the first detail was significant itself, so its four children guarantee nothing
        ("zerotree", [*["Insignificant"] * 4, "Positive", *["ZeroTree"] * 11, *["Insignificant"] * 3], ANY, ANY),
    ],
)
def test_what_was_said_rules_out_what_cannot_be(variant, before, strict, loose):
    assert after(codec(variant, side=8), before) == (strict, loose)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_notes_are_the_same_token_by_token_and_at_once(variant, channels):
    tokenizer = codec(variant, channels=channels)
    tokens = tokenizer.encode(to_float(torch.cat([noise(2, 16, channels), smooth(2, 16, channels)])))
    grammar = build_grammar(TokenLayout.from_dict(tokenizer.layout.to_dict()))
    notes, state = grammar.annotate(tokens), grammar.start(tokens.header)
    for position in range(tokens.ids.shape[1]):
        going = position < tokens.lengths
        assert torch.equal(state.going, going) and torch.equal(state.notes[going], notes[going, position])
        assert (notes[~going, position] == 0).all()
        grammar.advance(state, tokens.ids[:, position])
    assert not state.going.any()
    assert grammar.place(notes).shape == (*notes.shape[:2], grammar.place_width)
    assert grammar.known(notes).shape == (*notes.shape[:2], grammar.known_width)
    planes = grammar.reached(notes)[tokens.counted]
    assert planes.max() == tokenizer.planes - 1 and planes.min() == tokenizer.planes - tokens.header.max()


def test_notes_know_the_neighbours():
    """Right of a coefficient of -5, which is found at T=4: -1 in that plane, -2 and -3 in the next ones."""
    tokenizer = codec(side=8, final_threshold=1.0)
    values = np.zeros((1, 64))
    values[0, :2] = -5.0, 1.5
    tokens = tokenizer.encode_coefficients(values, np.array([3]))
    notes = tokenizer.grammar.annotate(tokens)
    left = 4 + NEIGHBOURS.index("left")
    there = (notes[0, :, 0] == 1) & tokens.counted[0]
    assert notes[0, there, left].tolist() == [-1, -2, -3]
    assert notes[0, there, 1].tolist() == [p + tokenizer.planes - 3 for p in range(3)]
    assert notes[0, there, 4].tolist() == [0, 0, 0]  # the coefficient itself, before it is found
