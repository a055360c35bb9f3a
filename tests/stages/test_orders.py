"""Orders of the prior: permutations, likelihood, sampling and storage."""

from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from data.layout import Field, Scale, TokenLayout, Tokens
from stages.contract import Prompts
from stages.prior.order import permutation_of, reordered
from stages.prior.sampling import SamplingConfig, sample
from stages.scales import keep_scales
from stages.weights import WeightsError, load_prior, read_weights, save_prior, save_weights
from tests.stages.bitplanes import codec
from tests.stages.test_prior import tokens
from tests.stages.toys import layout, prior

LABELS = Prompts.of_labels(torch.tensor([0, 2, -1]))
ORDERS = ("natural", "reversed", "interleaved", "luma_first")


def colours(num_fields=1):
    """Y0 C0 Y1 C1: luma on 2x2 places, chroma on two places; chroma has its own codebook."""
    books = [tuple(Field(f"{name}{index}", 7 + book) for index in range(num_fields)) for book, name in enumerate("yc")]

    def scale(name, length, grid, planes, k):
        book = int(planes == "chroma")
        return Scale(name, length, grid, book, books[book], (4 << k, 4 << k), planes)

    return TokenLayout(
        (
            scale("Y0", 4, (2, 2), "luma", 0),
            scale("C0", 2, (2, 1), "chroma", 0),
            scale("Y1", 4, (2, 2), "luma", 1),
            scale("C1", 2, (2, 1), "chroma", 1),
        )
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("of", [layout(), colours()])
def test_an_order_is_a_permutation_and_comes_back(of, order):
    if order == "luma_first" and of == layout():
        pytest.skip("it has no luma")
    model, given = prior(of, order=order), tokens(of)
    assert sorted(permutation_of(of, order)) == list(range(of.length))
    own = model.to_own_order(given)
    assert torch.equal(own.ids, torch.stack([given.ids[:, element] for element in permutation_of(of, order)], dim=1))
    assert torch.equal(model.to_layout_order(own).ids, given.ids)
    assert torch.equal(model.permutation[model.positions], torch.arange(of.length))
    assert [model.scale_at(position) for position in range(of.length)] == [
        of.scale_at(element) for element in permutation_of(of, order)
    ]


def test_permutations_of_small_layouts():
    assert permutation_of(layout(scales=2), "interleaved") == [0, 4, 1, 5, 2, 6, 3, 7]
    assert permutation_of(layout(scales=2), "reversed") == [7, 6, 5, 4, 3, 2, 1, 0]
    assert permutation_of(colours(), "luma_first") == [0, 1, 2, 3, 6, 7, 8, 9, 4, 5, 10, 11]
    # grids of 2x2 and 2x1: a place is a row
    assert permutation_of(colours(), "interleaved") == [0, 1, 4, 6, 7, 10, 2, 3, 5, 8, 9, 11]


@pytest.mark.parametrize(
    ("of", "order", "message"),
    [
        (layout(), "luma_first", "needs scales of luma and of chroma"),
        (codec().layout, "interleaved", "prior.order='interleaved'; allowed: natural, for streams"),
        (layout(), "raster", "prior.order='raster'; allowed: natural, reversed, interleaved, luma_first, scale"),
    ],
)
def test_orders_that_a_layout_does_not_have_are_refused(of, order, message):
    with pytest.raises(ValueError, match=message):
        prior(of, order=order)


def test_interleaving_needs_places_in_common():
    scales = layout(scales=2).scales
    odd = TokenLayout((scales[0], replace(scales[1], grid=(3, 1), length=3)))
    with pytest.raises(ValueError, match="no places in common"):
        permutation_of(odd, "interleaved")
    with pytest.raises(ValueError, match="these scales have no grid"):
        permutation_of(TokenLayout((replace(scales[0], grid=None), scales[1])), "interleaved")


def test_interleaving_that_is_the_natural_order_is_refused():
    scales = layout(scales=2).scales
    one_place = TokenLayout((replace(scales[0], grid=(1, 1), length=1), scales[1]))
    for of in (layout(scales=1), one_place):
        with pytest.raises(InputError, match=r"is the natural order of these tokens: .*; set prior.order=natural"):
            permutation_of(of, "interleaved")


def by_hand(model):
    """A natural-order prior over the permuted layout, in which each element is its own scale, with the same weights
    moved to the matching parameters."""
    of = model.layout
    homes = [(number, place) for number, scale in enumerate(of.scales) for place in range(scale.length)]
    homes = [homes[element] for element in model.permutation.tolist()]
    hand = prior(
        TokenLayout(
            tuple(
                replace(of.scales[number], name=f"{number}-{place}", length=1, grid=(1, 1)) for number, place in homes
            )
        )
    )
    mine, other = model.state_dict(), {}
    for name, tensor in mine.items():
        if (
            not name.startswith("inputs.")
            and "permutation" not in name
            or name.startswith(("inputs.chosen", "inputs.mix"))
        ):
            other[name] = tensor
    sizes = {book: sum(field.vocabulary_size for field in of.fields_of(book)) for book in of.codebooks}
    rows = dict(zip(sizes, mine["inputs.table.weight"].split(list(sizes.values())), strict=True))
    other["inputs.table.weight"] = torch.cat([rows[book] for book in hand.layout.codebooks])
    other["inputs.scale_embedding.weight"] = torch.stack(
        [
            mine["inputs.scale_embedding.weight"][number]
            + mine["inputs.row_embedding.weight"][place // of.scales[number].grid[1]]
            + mine["inputs.column_embedding.weight"][place % of.scales[number].grid[1]]
            for number, place in homes
        ]
    )
    for name in ("inputs.row_embedding.weight", "inputs.column_embedding.weight"):
        other[name] = torch.zeros_like(hand.state_dict()[name])
    hand.load_state_dict(other)
    return hand


@pytest.mark.parametrize("num_fields", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_the_likelihood_in_an_order_is_that_of_a_layout_permuted_by_hand(order, num_fields):
    of = colours(num_fields)
    model, given = prior(of, order=order), tokens(of)
    hand = by_hand(model)
    own = Tokens.fixed(given.ids[:, model.permutation])
    expected = torch.zeros(given.ids.shape)
    expected[:, model.permutation] = hand.nll(own, LABELS)
    torch.testing.assert_close(model.nll(given, LABELS), expected, atol=1e-5, rtol=1e-5)
    said, other = model(given, LABELS), hand(own, LABELS)
    torch.testing.assert_close(said.confidence[:, model.permutation], other.confidence, atol=1e-5, rtol=1e-5)
    assert torch.equal(said.hit[:, model.permutation], other.hit)


@pytest.mark.parametrize("num_fields", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_cached_logits_equal_the_full_pass_in_every_order(order, num_fields):
    of = colours(num_fields)
    model, given = prior(of, order=order), tokens(of)
    full, own = model.nll(given, LABELS)[:, model.permutation], model.to_own_order(given)
    for forced in (0, 3):
        state = model.begin(LABELS, own.prefix(forced), of.length)
        for position in range(forced, of.length):
            for index in range(num_fields):
                logits = model.logits(state, own.ids[:, position, :index])
                nll = -logits.log_softmax(-1).gather(1, own.ids[:, position, index : index + 1])[:, 0]
                torch.testing.assert_close(nll, full[:, position, index], atol=1e-5, rtol=1e-5)
            model.advance(state, own.ids[:, position])


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_known_stays_and_seeds_do_not_know_the_batch(order):
    of = colours()
    model, given = prior(of, order=order), tokens(of)
    settings = SamplingConfig(guidance=1.5, guidance_schedule="linear", temperature=[1.0, 0.5, 1.0, 0.8])
    together = sample(model, LABELS, settings, [4, 5, 6]).ids
    alone = [sample(model, LABELS[row : row + 1], settings, [4 + row]).ids for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    keep = torch.zeros(3, of.length, dtype=torch.bool)
    keep[:, [1, 4, 11]] = True
    kept = sample(model, LABELS, settings, [4, 5, 6], known=given, keep=keep).ids
    assert torch.equal(kept[keep], given.ids[keep]) and not torch.equal(kept, together)
    assert torch.equal(sample(model, LABELS, settings, [4, 5, 6], prefix=given).ids, given.ids)


def test_luma_given_is_a_beginning_in_luma_first_alone():
    of = colours()
    given, luma = tokens(of), [0, 2]
    beginning = keep_scales(given, of, luma)
    model = prior(of, order="luma_first")
    made = sample(model, LABELS, SamplingConfig(), range(3), prefix=beginning, whole=luma)
    assert torch.equal(keep_scales(made, of, luma).ids, beginning.ids)
    keep = torch.tensor([of.scales[of.scale_at(place)].planes == "luma" for place in range(of.length)]).expand(3, -1)
    assert torch.equal(sample(model, LABELS, SamplingConfig(), range(3), known=given, keep=keep).ids, made.ids)
    # chroma is drawn from the probabilities of the full pass, given the luma
    greedy = sample(model, LABELS, SamplingConfig(temperature=[0.0]), range(3), prefix=beginning, whole=luma)
    assert bool(model(greedy, LABELS).hit[:, [4, 5, 10, 11]].all())
    first = keep_scales(given, of, [0])
    assert torch.equal(sample(model, LABELS, SamplingConfig(), range(3), prefix=first).ids[:, :4], first.ids)
    with pytest.raises(ValueError, match=r"luma_first writes other elements .* train a prior with prior.order=natural"):
        sample(model, LABELS, SamplingConfig(), range(3), prefix=given.prefix(5))
    for order in ("reversed", "interleaved"):
        with pytest.raises(ValueError, match=f"prior.order={order} writes other elements"):
            sample(prior(layout(), order=order), LABELS, SamplingConfig(), range(3), prefix=tokens(layout()).prefix(4))


@pytest.mark.parametrize("order", ["natural", "scale"])
def test_a_beginning_is_not_taken_for_another(order):
    """In orders that start with the first scales, a prefix of other scales is refused."""
    of = layout()
    model, given = prior(of, order=order), tokens(of)
    for whole in ([1], [0, 2]):
        part = keep_scales(given, of, whole)
        with pytest.raises(InputError, match=f"prior.order={order} writes other elements .*; give its first scales"):
            sample(model, LABELS, SamplingConfig(), range(3), prefix=part, whole=whole)
    first = keep_scales(given, of, [0, 1])
    assert torch.equal(model.to_own_order(first, [0, 1]).ids, first.ids)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_parts_that_an_order_does_not_have_are_refused(order):
    of = colours()
    model, given = prior(of, order=order), tokens(of)
    with pytest.raises(InputError, match=f"4 of 12 elements; allowed with prior.order={order}: all"):
        model(given.prefix(4), LABELS)
    with pytest.raises(InputError, match=f"sampling.scales=1: this prior writes scales in the order {order}"):
        sample(model, LABELS, SamplingConfig(scales=1), range(3))
    assert sample(model, LABELS, SamplingConfig(scales=4), range(3)).ids.shape == given.ids.shape
    uneven = replace(given.prefix(4), lengths=torch.tensor([4, 2, 4]))
    with pytest.raises(InputError, match=f"have 2 to 4 elements; .* prior.order={order}: the same number in every row"):
        sample(model, LABELS, SamplingConfig(), range(3), prefix=uneven)


def test_averages_stop_at_scales_where_these_are_in_one_piece():
    of = colours()
    assert [scale.name for scale in reordered(of, permutation_of(of, "luma_first")).scales] == ["Y0", "Y1", "C0", "C1"]
    model, given = prior(of, order="luma_first", averaging="replace", averaging_borders="grid"), tokens(of)
    full, own = model.nll(given, LABELS)[:, model.permutation], model.to_own_order(given)
    state = model.begin(LABELS, None, of.length)
    for position in range(of.length):
        logits = model.logits(state, own.ids[:, position, :0])
        nll = -logits.log_softmax(-1).gather(1, own.ids[:, position, :1])
        torch.testing.assert_close(nll, full[:, position], atol=1e-5, rtol=1e-5)
        model.advance(state, own.ids[:, position])
    with pytest.raises(ValueError, match="no scale is in one piece; allowed: sample"):
        prior(layout(), order="interleaved", averaging="replace", averaging_borders="scale")
    prior(layout(), order="interleaved", averaging="replace", averaging_borders="sample")


def test_the_order_is_stored_with_the_weights(tmp_path):
    model, path = prior(layout(), order="interleaved"), tmp_path / "prior.safetensors"
    save_prior(path, model, model.config, model.condition_config, {})
    loaded, metadata = load_prior(path)
    assert torch.equal(loaded.permutation, model.permutation)
    assert torch.equal(loaded.nll(tokens(layout()), LABELS), model.nll(tokens(layout()), LABELS))
    assert read_weights(path)[1]["permutation"].tolist() == permutation_of(layout(), "interleaved")
    model.permutation = model.permutation.flip(0)
    save_weights(path, model, metadata)
    with pytest.raises(WeightsError, match=r"its stored order is not prior.order=interleaved of this version"):
        load_prior(path)


@pytest.mark.parametrize("order", ["natural", "reversed"])
def test_weights_from_before_orders_were_stored(tmp_path, order):
    """Natural-order weights still load; reversed ones counted their scales from the end and are refused."""
    model, path = prior(layout(), order=order), tmp_path / "prior.safetensors"
    expected = model.nll(tokens(layout()), LABELS)
    save_prior(path, model, model.config, model.condition_config, {})
    metadata = read_weights(path)[0]
    model.register_buffer("permutation", model.permutation, persistent=False)
    save_weights(path, model, metadata)
    if order == "natural":
        torch.testing.assert_close(load_prior(path)[0].nll(tokens(layout()), LABELS), expected)
    else:
        with pytest.raises(WeightsError, match="trained before orders were stored; train it again") as caught:
            load_prior(path)
        assert "\n" not in str(caught.value)
