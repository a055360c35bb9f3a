"""SIT with wavelets other than Haar, and with overlapping patches."""

import pytest
import torch
from torch.nn import functional

from data.layout import TokenLayout
from stages.factory import build_tokenizer
from stages.spectral.patches import from_windows, to_patches, to_windows
from stages.spectral.wavelets import dwt, idwt
from stages.tokenizer.quantizers import FSQConfig
from stages.tokenizer.sit import SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig
from stages.weights import load_tokenizer, read_weights, save_tokenizer, save_weights

SMALL = TransformerConfig(depth=2, width=32, heads=4)
WAVELETS = ("bior2.2", "bior4.4", "db2")


def make(kind=SITConfig, **keys):
    torch.manual_seed(0)
    config = kind(**{"encoder": SMALL, "decoder": SMALL, "quantizer": FSQConfig(levels=[4, 3]), **keys})
    tokenizer = build_tokenizer(config, (32, 32), 3)
    with torch.no_grad():  # new weights are near zero; with larger ones every token matters
        for parameter in tokenizer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer.fit([(pixels(), None)])
    return tokenizer.eval()


def pixels(batch=4):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(first, second):
    """Whether tokens agree, up to ties changed by rounding."""
    return (first == second).float().mean() > 0.999


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize(("patch", "margin"), [(2, 1), (4, 1), (4, 2), (2, 2), (4, 3), (1, 1), (3, 0)])
def test_windows_of_a_band_give_it_back(patch, margin):
    band = torch.randn(2, 3, 4 * patch, 2 * patch, dtype=torch.float64)
    windows = to_windows(band, patch, margin)
    side = patch + 2 * margin
    assert windows.shape == (2, 8, 3 * side * side)
    torch.testing.assert_close(from_windows(windows, patch, margin, (4, 2)), band)


def test_windows_are_patches_with_what_is_around_them():
    band = torch.arange(64.0).view(1, 1, 8, 8)
    window = to_windows(band, 2, 1)[0, 5].view(4, 4)
    assert torch.equal(window, band[0, 0, 1:5, 1:5])
    assert torch.equal(window[1:3, 1:3].flatten(), to_patches(band, 2)[0, 5])
    corner = to_windows(band, 2, 1)[0, 0].view(4, 4)
    assert corner[0].tolist() == [0, 0, 1, 2] and corner[:, 0].tolist() == [0, 0, 8, 16]  # border pixels are repeated


@pytest.mark.parametrize(("patch", "margin"), [(4, 1), (4, 2), (2, 2)])
def test_overlap_keeps_constants_and_blends_the_rest(patch, margin):
    side = patch + 2 * margin
    ones = torch.full((1, 9, side * side), 0.3, dtype=torch.float64)
    constant = from_windows(ones, patch, margin, (3, 3))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))
    one = torch.zeros(1, 9, side * side, dtype=torch.float64)
    one[:, 4] = 1
    made = from_windows(one, patch, margin, (3, 3))[0, 0]
    torch.testing.assert_close(made, made.flip(0))
    torch.testing.assert_close(made, made.T)
    row = 3 * patch // 2
    middle = made[row, patch - margin : 2 * patch + margin] / made[row, row].sqrt()
    ramp = (torch.arange(2 * margin, dtype=torch.float64) + 0.5) / (2 * margin)
    if 2 * margin <= patch:  # linear ramps, and 1 where no neighbor overlaps
        torch.testing.assert_close(middle[: 2 * margin], ramp)
    else:
        assert (middle[: len(middle) // 2].diff() > 0).all() and 0 < middle[0] < middle.max() < 1


def test_a_side_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="patches of 4"):
        to_windows(torch.zeros(1, 1, 6, 8), 4, 1)


# ---------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_coefficients_round_trip(wavelet, overlap):
    tokenizer = make(transform=wavelet, overlap=overlap, scales=4)
    parts = tokenizer.analyse(pixels())
    side = 2 + 2 * overlap
    assert [part.shape[2] for part in parts] == [3 * side**2, 9 * side**2, 9 * (2 * side) ** 2, 9 * (4 * side) ** 2]
    torch.testing.assert_close(tokenizer.synthesise(parts), pixels(), atol=1e-5, rtol=0)


def test_the_vit_may_overlap_too():
    tokenizer = make(ViTVQGANConfig, patch=8, overlap=2)
    assert tokenizer.embed[0].in_features == 3 * 12 * 12 and tokenizer.layout.length == 16
    torch.testing.assert_close(tokenizer.synthesise(tokenizer.analyse(pixels())), pixels(), atol=1e-5, rtol=0)


def test_overlap_costs_what_the_docstring_says():
    """Embedding and head grow by (1 + 2 overlap / patch)²; the layers do not grow."""
    plain, wide = make(overlap=0), make(overlap=1)
    for part in ("embed", "heads"):
        pairs = zip(getattr(plain, part), getattr(wide, part), strict=True)
        assert all(second.weight.numel() == 4 * first.weight.numel() for first, second in pairs)
    for part in ("encoder", "decoder", "quantizers"):
        first, second = (sum(p.numel() for p in getattr(each, part).parameters()) for each in (plain, wide))
        assert first == second


def test_what_a_token_sees_and_writes_reaches_into_its_neighbours():
    tokenizer = make(overlap=1, scales=2)
    changed = pixels()
    changed[..., 16, 16] += 1  # in the last quarter, at the corner where four patches of 4 px meet
    for index, part in enumerate(tokenizer.analyse(changed)):
        differs = (part != tokenizer.analyse(pixels())[index]).any(-1)[0].view(8, 8)
        assert differs.nonzero().tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]


@pytest.mark.parametrize(("wavelet", "overlap"), [*((wavelet, 0) for wavelet in WAVELETS), ("haar", 1), ("bior4.4", 2)])
def test_a_small_image_gives_the_first_scales(wavelet, overlap):
    tokenizer = make(attention="sit-sce", transform=wavelet, overlap=overlap)
    full = tokenizer.encode(pixels()).ids
    for num_scales in (1, 2, 3, 4):
        small = tokenizer.reference(pixels(), num_scales)
        torch.testing.assert_close(small, dwt(pixels(), 4 - num_scales, wavelet, "averaging")[0])
        ids = tokenizer.encode(small).ids
        assert ids.shape[1] == tokenizer.layout.prefix_length(num_scales) and same(ids, full[:, : ids.shape[1]])


@pytest.mark.parametrize("attention", ["sit", "sit-sce"])
def test_finer_details_leave_coarser_tokens_only_under_a_causal_encoder(attention):
    tokenizer = make(attention=attention, transform="bior4.4", overlap=1)
    bands = dwt(pixels(), 3, "bior4.4", "averaging")
    bands[2] = bands[2] + torch.randn_like(bands[2])  # scale 3 of 4
    changed = tokenizer.encode(idwt(bands, "bior4.4", "averaging")).ids
    end = tokenizer.layout.prefix_length(2)
    assert same(changed[:, :end], tokenizer.encode(pixels()).ids[:, :end]) == (attention == "sit-sce")


@pytest.mark.parametrize(("wavelet", "overlap"), [("bior2.2", 0), ("bior4.4", 1), ("sym4", 0)])
def test_a_prefix_decodes_to_the_reduced_full_decode(wavelet, overlap):
    tokenizer = make(attention="sit-scd", transform=wavelet, overlap=overlap)
    tokens = tokenizer.encode(pixels())
    full = tokenizer._decode_features(features_of(tokenizer, tokens))[0]
    for num_scales in (1, 2, 3):
        prefix = tokenizer.decode(tokens.prefix(tokenizer.layout.prefix_length(num_scales)))
        wanted = tokenizer.reference(full, num_scales).clamp(-1, 1)
        torch.testing.assert_close(prefix, wanted, atol=1e-4, rtol=0)


def features_of(tokenizer, tokens):
    parts = zip(tokenizer.quantizers, tokenizer._by_codebook(tokens.ids), strict=True)
    return tokenizer._in_order([quantizer.lookup(part) for quantizer, part in parts])


def test_fit_makes_every_scale_of_unit_size():
    tokenizer = make(transform="bior4.4")
    for index, part in enumerate(tokenizer.analyse(pixels())):
        normalised = (part - tokenizer.scale_mean[index]) / tokenizer.scale_std[index]
        assert normalised.std() == pytest.approx(1, abs=0.02)


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = make(attention="sit-sc", transform="sym4", overlap=1)
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, tokenizer.config)
    loaded, metadata = load_tokenizer(tmp_path / "t.safetensors")
    assert loaded.config.transform == "sym4" and TokenLayout.from_dict(metadata["layout"]) == tokenizer.layout
    assert torch.equal(loaded.encode(pixels()).ids, tokenizer.encode(pixels()).ids)


def test_a_file_from_before_these_keys_is_haar_without_overlap(tmp_path):
    tokenizer = make(attention="sit-sc")
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, tokenizer.config)
    metadata, _ = read_weights(tmp_path / "t.safetensors")
    for key in ("overlap", "planes"):
        del metadata["config"][key]
    save_weights(tmp_path / "old.safetensors", tokenizer, metadata)
    loaded, _ = load_tokenizer(tmp_path / "old.safetensors")
    assert torch.equal(loaded.encode(pixels()).ids, tokenizer.encode(pixels()).ids)
    torch.testing.assert_close(loaded.reference(pixels(), 1), functional.avg_pool2d(pixels(), 8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transform": "bior3.3"}, r"transform='bior3.3'; allowed: identity, haar, bior2.2, bior4.4, or an orthogonal"),
        ({"overlap": 3}, r"tokenizer.overlap=3; allowed: 0 to tokenizer.patch=2"),
        ({"overlap": -1}, r"tokenizer.overlap=-1; allowed"),
    ],
)
def test_what_there_is_not_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        make(**keys)
