"""Nested spectral tokens: prefixes decode to low-passed images, and later tokens do not affect earlier ones."""

import math

import pytest
import torch

from data.layout import TokenLayout, Tokens
from stages.factory import build_tokenizer
from stages.spectral.dct import dct_matrix, lowpass
from stages.tokenizer.nested import NestedConfig, doubling, equal_shares, information, widths_of
from stages.tokenizer.quantizers import CosineVQConfig, FSQConfig
from stages.tokenizer.rings import RingSummaries, shares_of
from stages.tokenizer.transformer import TransformerConfig
from stages.weights import load_tokenizer, save_tokenizer

SMALL = TransformerConfig(depth=2, width=32, heads=4)
N = 12


def make(quantizer=None, size=(32, 32), channels=3, **keys):
    torch.manual_seed(0)
    keys = {"num_tokens": N, "patch": 8, "quantizer": quantizer or FSQConfig(), **keys}
    tokenizer = build_tokenizer(NestedConfig(encoder=SMALL, decoder=SMALL, **keys), size, channels)
    with torch.no_grad():  # new weights are near zero; with larger ones every token matters
        for parameter in tokenizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer.fit([(pixels(size=size, channels=channels), None)])
    return tokenizer.eval()


def pixels(batch=4, size=(32, 32), channels=3):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_all_frequencies_give_the_image_itself_and_few_only_those(size):
    images = pixels(6, size)
    side = max(size)
    widths = torch.tensor([1, 2, 7, 15, side - 1, side])
    low = lowpass(images, widths)
    assert torch.equal(low[-1], images[-1])
    rows, columns = (dct_matrix(length).float() for length in size)
    before, after = (rows @ each @ columns.T for each in (images, low))
    for index, width in enumerate(widths.tolist()):
        torch.testing.assert_close(after[index, :, :width, :width], before[index, :, :width, :width], atol=1e-5, rtol=0)
        assert after[index, :, width:].abs().sum() < 1e-3 * images[index].abs().sum()
        assert after[index, :, :, width:].abs().sum() < 1e-3 * images[index].abs().sum()
    torch.testing.assert_close(low[0], images[0].mean((1, 2), keepdim=True).expand_as(low[0]), atol=1e-5, rtol=0)


def test_the_reference_of_all_tokens_is_the_image():
    tokenizer = make()
    assert torch.equal(tokenizer.reference(pixels(), N), pixels())
    errors = [float((tokenizer.reference(pixels(), k) - pixels()).square().mean()) for k in range(1, N + 1)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1


@pytest.mark.parametrize("law", ["information", "energy", "power", "mirrored"])
@pytest.mark.parametrize("exponent", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("number", [1, 5, 64])
def test_maps_never_fall_and_end_at_the_full_square(law, exponent, number):
    tokenizer = make(frequency_map=law, frequency_exponent=exponent, num_tokens=number)
    widths = tokenizer.widths.tolist()
    assert len(widths) == number and widths == sorted(widths) and widths[0] >= 1 and widths[-1] == 32


def test_power_laws_spend_tokens_both_ways():
    def half(law, exponent):
        return widths_of(NestedConfig(num_tokens=64, frequency_map=law, frequency_exponent=exponent), 64)[31]

    assert half("power", 2.0) == 16 < half("power", 1.0) == 32 < half("power", 0.5)
    assert half("mirrored", 2.0) > half("mirrored", 1.0) > half("mirrored", 0.5)


def test_an_equal_share_of_energy_a_token():
    spectrum = torch.zeros(8, 8, dtype=torch.float64)
    spectrum[0, 0] = spectrum[0, 3] = spectrum[5, 5] = spectrum[7, 0] = 1
    assert equal_shares(spectrum, 4) == [1, 4, 6, 8]
    assert equal_shares(spectrum, 8) == [1, 1, 4, 4, 6, 6, 8, 8]
    assert equal_shares(torch.zeros(8, 8, dtype=torch.float64), 3)[-1] == 8


def test_information_is_what_water_filling_spends():
    variances = torch.tensor([[64.0, 16.0], [4.0, 0.25]], dtype=torch.float64)
    # at a distortion of 1: 3 + 2 + 1 bits, and 0 bits for variances below it
    torch.testing.assert_close(information(variances, 6.0), torch.tensor([[3.0, 2.0], [1.0, 0.0]]).double())
    for bits in (0.5, 3.0, 40.0):
        spent = information(variances, bits)
        assert float(spent.sum()) == pytest.approx(bits, rel=1e-6)
        left = variances * 4.0**-spent
        assert torch.allclose(left[spent > 0], left[spent > 0][0]) and (variances[spent == 0] <= left.max()).all()
    assert not information(torch.zeros(4, 4, dtype=torch.float64), 10.0).isnan().any()


def test_a_finer_code_reaches_further():
    """With more tokens, more frequencies get bits, so the share of tokens for the lowest ones falls."""
    slope = 1.0 / (torch.arange(32)[:, None] + torch.arange(32) + 1.0) ** 2
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * slope.sqrt()
    matrix = dct_matrix(32).float()
    images = matrix.T @ images @ matrix
    coarse, fine = (make(num_tokens=number) for number in (4, 64))
    for tokenizer in (coarse, fine):
        tokenizer.fit([(images, None)])
    assert fine.widths[-2] > coarse.widths[-2]
    assert fine.widths.unique().numel() > 8


def test_the_energy_of_smooth_images_lies_in_few_frequencies_and_is_stored(tmp_path):
    smooth = lowpass(pixels(16), torch.full((16,), 5))
    tokenizer = make(frequency_map="energy")
    tokenizer.fit([(smooth[:9], None), (smooth[9:], None)])
    assert tokenizer.widths[:-1].max() <= 5 and tokenizer.widths[-1] == 32
    rough = make(frequency_map="energy").widths
    assert (rough[:-1] > tokenizer.widths[:-1]).all()
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, tokenizer.config)
    loaded, _ = load_tokenizer(tmp_path / "t.safetensors")
    assert torch.equal(loaded.widths, tokenizer.widths)
    assert torch.equal(loaded.decode(loaded.encode(pixels())), tokenizer.decode(tokenizer.encode(pixels())))


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("changed", [1, 5, N - 1])
@pytest.mark.parametrize("summaries", [0, 3])
def test_a_token_knows_no_later_query_not_even_through_the_patches(changed, summaries):
    tokenizer = make(ring_summaries=summaries)
    before = tokenizer._encode_features(pixels())
    with torch.no_grad():
        tokenizer.queries[:, changed:] += torch.randn_like(tokenizer.queries[:, changed:])
    after = tokenizer._encode_features(pixels())
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.isclose(before[:, changed:], after[:, changed:]).all(-1).any()


def test_a_token_knows_every_patch_and_every_earlier_query():
    tokenizer = make()
    queries = tokenizer.queries.detach().clone()
    images = pixels(1).requires_grad_()
    for place in (0, 5, N - 1):
        tokenizer.queries.grad = images.grad = None
        tokenizer._encode_features(images)[0, place].sum().backward()
        seen = tokenizer.queries.grad[0].abs().sum(-1) > 0
        assert seen.tolist() == [index <= place for index in range(N)]
        assert (images.grad.abs().amax((0, 1)).unfold(0, 8, 8).unfold(1, 8, 8).amax((-1, -2)) > 0).all()
    assert torch.equal(queries, tokenizer.queries)


@pytest.mark.parametrize("length", [1, 4, N])
@pytest.mark.parametrize("summaries", [0, 3])
def test_a_prefix_ignores_what_comes_later(length, summaries):
    tokenizer = make(ring_summaries=summaries)
    tokens = tokenizer.encode(pixels())
    alone = tokenizer.decode(tokens.prefix(length))
    features = tokenizer.quantizer.lookup(tokens.ids)
    lengths = torch.full((4,), length)
    masked = tokenizer._decode_features(features, lengths)[0]
    torch.testing.assert_close(masked.clamp(-1, 1), alone, atol=1e-5, rtol=0)
    changed = features.clone()
    changed[:, length:] += torch.randn_like(changed[:, length:])
    assert torch.equal(tokenizer._decode_features(changed, lengths)[0], masked)
    mixed = tokenizer._decode_features(features, torch.tensor([1, length, N, 2]))[0]  # as in training
    torch.testing.assert_close(mixed[1], masked[1], atol=1e-5, rtol=0)
    changed = features.clone()
    changed[:, length - 1] += torch.randn(4, 32)
    assert not torch.allclose(tokenizer._decode_features(changed, lengths)[0], masked)


def test_what_a_prefix_makes_has_its_frequencies_only_and_is_nearer_to_what_it_should_be():
    cut, free = make(), make(project=False)
    tokens = cut.encode(pixels())
    for length in (1, 6, N):
        features = cut.quantizer.lookup(tokens.ids[:, :length])
        lengths, wanted = torch.full((4,), length), cut.reference(pixels(), length)
        made, raw = (each._decode_features(features, lengths)[0] for each in (cut, free))
        width = cut.widths[length - 1].expand(4)
        torch.testing.assert_close(lowpass(made, width), made, atol=1e-4, rtol=0)
        errors = [(each - wanted).square().sum((1, 2, 3)) for each in (made, raw)]
        assert (errors[0] <= errors[1] + 1e-3).all()
        assert torch.equal(made, raw) == (length == N)


# ---------------------------------------------------------------------- rings


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
@pytest.mark.parametrize("widths", [[1, 1, 3, 3, 10], [2, 5, 5, 5, 10], [10], [1, 1, 1, 10, 10, 10, 10]])
def test_every_frequency_is_shared_out_once_inside_its_ring(size, widths):
    widths = torch.tensor(widths).clamp(max=max(size))
    of_frequency, of_token = shares_of(widths, size)
    assert of_frequency.shape == size and set(of_frequency.flatten().tolist()) == set(of_token.tolist())
    assert of_token.diff().min() >= 0 if len(widths) > 1 else True
    for row in range(size[0]):
        for column in range(size[1]):
            owners = (of_token == of_frequency[row, column]).nonzero()[:, 0]
            reach = max(row, column) + 1
            ring = widths[widths >= reach].min()
            assert (widths[owners] == ring).all()
    for width in widths.unique():  # equal parts, up to rounding
        tokens = of_token[widths == width].unique()
        parts = torch.stack([(of_frequency == token).sum() for token in tokens])
        assert parts.max() - parts.min() <= 1


def test_shares_by_hand():
    of_frequency, of_token = shares_of(torch.tensor([1, 1, 3, 3, 4]), (4, 4))
    assert of_token.tolist() == [0, 0, 1, 2, 3]
    assert of_frequency.tolist() == [[0, 1, 1, 3], [2, 1, 1, 3], [2, 2, 2, 3], [3, 3, 3, 3]]


def rings(widths=(1, 1, 3, 3, 8)):
    torch.manual_seed(0)
    return RingSummaries(5, 4, 16, 24, (3, 8, 8)), torch.tensor(widths)


def test_what_is_told_is_in_units_of_each_frequencys_deviation():
    summaries, widths = rings()
    images = torch.randn(2, 3, 8, 8)
    before, added = summaries.analyse(images, widths), summaries.synthesise(torch.ones(2, 5, 24), widths)
    summaries.deviation.fill_(2)
    torch.testing.assert_close(summaries.analyse(images, widths), before / 2)
    torch.testing.assert_close(summaries.synthesise(torch.ones(2, 5, 24), widths), added * 2)


def test_a_token_is_told_of_its_own_share_and_of_nothing_else():
    summaries, widths = rings()
    images, matrix = torch.randn(2, 3, 8, 8), dct_matrix(8).float()
    of_frequency, of_token = shares_of(widths, (8, 8))
    before = summaries.analyse(images, widths)
    for share in of_token.unique():
        change = torch.randn(2, 3, 8, 8) * (of_frequency == share)
        after = summaries.analyse(images + matrix.T @ change @ matrix, widths)
        for token in range(5):
            same = torch.allclose(before[:, token], after[:, token], atol=1e-4)
            assert same == (of_token[token] != share), (share, token)


def test_a_token_adds_to_its_own_share_only():
    summaries, widths = rings()
    matrix = dct_matrix(8).float()
    of_frequency, of_token = shares_of(widths, (8, 8))
    for token in range(5):
        features = torch.zeros(2, 5, 24)
        features[:, token] = torch.randn(2, 24)
        found = matrix @ summaries.synthesise(features, widths) @ matrix.T
        inside = of_frequency == of_token[token]
        assert (found.abs() > 1e-6)[..., inside].float().mean() > 0.9
        assert found[..., ~inside].abs().max() < 1e-5
        part = summaries.synthesise(features[:, : token + 1], widths)
        torch.testing.assert_close(part, summaries.synthesise(features, widths), atol=1e-5, rtol=0)


def test_the_deviations_of_frequencies_are_measured():
    smooth = lowpass(pixels(64), torch.full((64,), 4)) + 0.5
    tokenizer = make()
    tokenizer.fit([(smooth[:40], None), (smooth[40:], None)])
    matrix = dct_matrix(32)
    normalised = (smooth.double() - tokenizer.pixel_mean) / tokenizer.pixel_std
    wanted = (matrix @ normalised @ matrix.T).square().mean((0, 1)).sqrt()
    torch.testing.assert_close(tokenizer.rings.deviation[:4, :4].double(), wanted[:4, :4], rtol=1e-3, atol=0)
    assert (tokenizer.rings.deviation[4:] == 1e-3).all()  # a floor for frequencies that never occur


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("quantizer", [FSQConfig(), CosineVQConfig(codes=64, code_dim=8)])
def test_decode_of_encode_is_the_reconstruction_of_all_tokens(quantizer):
    tokenizer = make(quantizer)
    output = tokenizer(pixels())
    assert torch.equal(output.ids, tokenizer.encode(pixels()).ids) and output.target is None
    made = tokenizer.decode(Tokens.fixed(output.ids))
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), made, atol=1e-5, rtol=0)


def test_training_asks_for_the_low_passed_image_of_each_prefix(monkeypatch):
    tokenizer = make().train()
    lengths = torch.tensor([1, 4, N, 9])
    monkeypatch.setattr(tokenizer, "draw_lengths", lambda count: lengths[:count])
    output = tokenizer(pixels())
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(output.target[row], tokenizer.reference(pixels(), length)[row])
    (output.reconstruction - output.target).square().mean().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


@pytest.mark.parametrize(("law", "share"), [("uniform", 0.0), ("uniform", 0.5), ("log_uniform", 0.2)])
def test_prefixes_follow_their_law(law, share):
    tokenizer = make(prefix_law=law, full_share=share)
    torch.manual_seed(0)
    drawn = tokenizer.draw_lengths(200_000)
    assert drawn.min() == 1 and drawn.max() == N
    for length in range(1, N):
        uniform = 1 / N if law == "uniform" else math.log((length + 1) / length) / math.log(N + 1)
        found = float((drawn == length).float().mean())
        assert found == pytest.approx((1 - share) * uniform, abs=0.004), length
    assert float((drawn == N).float().mean()) >= share


def test_the_last_token_is_starved_without_the_balance():
    plain, balanced = make(full_share=0.0), make()
    torch.manual_seed(0)
    reached = [(each.draw_lengths(100_000) == N).float().mean() for each in (plain, balanced)]
    assert reached[0] < 1.1 / N and reached[1] > 0.5


# ---------------------------------------------------------------------- layout and invalid input


def test_the_layout_is_one_scale_a_token_with_few_to_report():
    layout = make().layout
    assert layout.length == N and len(layout.scales) == N and layout.codebooks == (0,)
    assert layout.prefixes == (1, 2, 4, 8, 12) and layout.decodes_prefixes and not layout.encodes_prefixes
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    assert [doubling(number) for number in (1, 2, 5, 64)] == [(1,), (1, 2), (1, 2, 4, 5), (1, 2, 4, 8, 16, 32, 64)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_tokens": 3, "widths": [8, 4, 32]}, "falls from 8 to 4 at token 2"),
        ({"num_tokens": 2, "widths": [8, 16]}, "ends at 16; it must end at the full square, 32"),
        ({"num_tokens": 2, "widths": [0, 32]}, "falls from 1 to 0 at token 1"),
        ({"num_tokens": 2, "widths": [32]}, "has 1 widths for tokenizer.num_tokens=2"),
        (
            {"frequency_map": "linear"},
            "frequency_map='linear'; allowed: information, energy, power, mirrored",
        ),
        ({"prefix_law": "all"}, "tokenizer.prefix_law='all'; allowed: uniform, log_uniform"),
        ({"frequency_exponent": 0.0}, "frequency_exponent=0.0; allowed: above 0"),
        ({"full_share": 1.5}, "full_share=1.5; allowed: 0 to 1"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"ring_summaries": -1}, "ring_summaries=-1; allowed: 0 or more"),
        ({"patch": 5}, "images.size=32: patches of 5"),
    ],
)
def test_a_map_that_is_none_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        make(**keys)


def test_wrong_input_is_named():
    tokenizer = make()
    with pytest.raises(ValueError, match="16x16; this tokenizer takes 32x32"):
        tokenizer.encode(pixels()[..., ::2, ::2])
    with pytest.raises(ValueError, match="no tokens"):
        tokenizer.decode(tokenizer.encode(pixels()).prefix(0))
    with pytest.raises(ValueError, match="id 1000"):
        tokenizer.decode(Tokens.fixed(torch.full((1, N, 1), 1000)))
    with pytest.raises(ValueError, match="no images"):
        tokenizer.fit([])


def test_given_widths_stand():
    assert make(num_tokens=3, widths=[2, 2, 32], frequency_map="energy").widths.tolist() == [2, 2, 32]


@pytest.mark.parametrize("size", [(16, 40), (8, 8)])
def test_any_size_of_whole_patches(size):
    tokenizer = make(size=size, channels=1)
    images = pixels(size=size, channels=1)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    assert tokenizer.decode(tokenizer.encode(images).prefix(2)).shape == images.shape
