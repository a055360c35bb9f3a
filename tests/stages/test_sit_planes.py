"""SIT with separate luma and chroma: geometry, attention masks, prefixes, and colorization."""

import pytest
import torch

from data.layout import TokenLayout
from stages.conditions.labels import ClassConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior, build_tokenizer
from stages.prior.sampling import SamplingConfig, sample
from stages.prior.transformer import TransformerPriorConfig
from stages.spectral.colour import join_planes, luma_of, split_planes, to_ycbcr
from stages.tokenizer.quantizers import CosineVQConfig, FSQConfig
from stages.tokenizer.sit import CAUSAL, SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig, blind_to_chroma
from stages.weights import load_tokenizer, save_tokenizer

SMALL = TransformerConfig(depth=2, width=32, heads=4)


def make(attention="sit", kind=SITConfig, seed=0, **keys):
    torch.manual_seed(seed)
    defaults = {"encoder": SMALL, "decoder": SMALL, "quantizer": FSQConfig(levels=[4, 3]), "scales": 3, "patch": 2}
    tokenizer = build_tokenizer(kind(attention=attention, planes="ycbcr", **{**defaults, **keys}), (32, 32), 3)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer.fit([(pixels(), None)])
    return tokenizer.eval()


def pixels(batch=4):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gray_of(x):
    return split_planes(x)[..., :1, :, :].expand_as(x)


def of_planes(tokenizer, planes):
    """bool [L]: the tokens of ``planes`` (luma or chroma)."""
    lengths = torch.tensor([scale.length for scale in tokenizer.layout.scales])
    return torch.tensor([scale.planes == planes for scale in tokenizer.layout.scales]).repeat_interleave(lengths)


# ---------------------------------------------------------------------- colors


def test_planes_are_jpegs_in_the_range_of_pixels():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    wanted = torch.from_numpy(to_ycbcr(x.numpy()))
    found = split_planes(x * 2 - 1)
    torch.testing.assert_close(found[:, 0], wanted[:, 0] * 2 - 1)
    torch.testing.assert_close(found[:, 1:], wanted[:, 1:] * 2)
    torch.testing.assert_close(join_planes(found), x * 2 - 1)
    corners = torch.cartesian_prod(*([torch.tensor([-1.0, 1.0])] * 3))[:, :, None, None]
    assert split_planes(corners).abs().amax() <= 1 + 1e-6


def test_gray_is_its_own_luma_bit_for_bit():
    gray = (torch.rand(1, 1, 8, 8) * 2 - 1).expand(-1, 3, -1, -1)
    planes = split_planes(gray)
    assert torch.equal(planes[:, 0], gray[:, 0]) and not planes[:, 1:].any()


# ---------------------------------------------------------------------- geometry


def test_each_scale_becomes_two():
    scales = make().layout.scales
    assert [scale.name for scale in scales[:3]] == ["approximation luma", "approximation chroma", "detail1 luma"]
    assert [scale.planes for scale in scales] == ["luma", "chroma"] * 3
    assert [scale.grid for scale in scales] == [(4, 4), (2, 2)] * 3
    assert [scale.image_size[0] for scale in scales] == [8, 8, 16, 16, 32, 32]
    assert [scale.codebook for scale in scales] == [0, 1, 2, 3, 2, 3]
    assert make().layout.length == 60


def test_patches_hold_every_coefficient_once():
    tokenizer = make()
    parts = tokenizer.analyse(pixels())
    assert [part.shape[1:] for part in parts] == [(16, 4), (4, 32), (16, 12), (4, 96), (16, 48), (4, 384)]
    assert sum(part[0].numel() for part in parts) == 3 * 32 * 32
    torch.testing.assert_close(tokenizer.synthesise(parts), pixels(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [{"transform": "bior4.4", "overlap": 1}, {"transform": "identity", "scales": 1}])
def test_planes_compose_with_wavelets_overlap_and_none(keys):
    tokenizer = make(**keys)
    torch.testing.assert_close(tokenizer.synthesise(tokenizer.analyse(pixels())), pixels(), atol=1e-5, rtol=0)
    assert [scale.planes for scale in tokenizer.layout.scales] == ["luma", "chroma"] * tokenizer.config.scales


def test_the_raster_baseline_has_planes_too():
    tokenizer = make(kind=ViTVQGANConfig, patch=4, scales=1)
    assert [(scale.name, scale.length) for scale in tokenizer.layout.scales] == [
        ("raster luma", 64),
        ("raster chroma", 16),
    ]
    assert tokenizer.decode(tokenizer.encode(pixels())).shape == (4, 3, 32, 32)


# ---------------------------------------------------------------------- attention masks


def test_the_mask_hides_chroma_from_luma_alone():
    assert blind_to_chroma(["luma", "chroma", "luma"], [1, 2, 1]).int().tolist() == [
        [1, 0, 0, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 0, 0, 1],
    ]


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("keys", [{}, {"transform": "bior4.4", "overlap": 1}, {"transform": "identity", "scales": 1}])
def test_a_gray_image_has_exactly_the_luma_tokens_of_its_colour_version(attention, keys):
    tokenizer = make(attention, **keys)
    luma = of_planes(tokenizer, "luma")
    colour, gray = tokenizer.encode(pixels()).ids, tokenizer.encode(gray_of(pixels())).ids
    assert torch.equal(colour[:, luma], gray[:, luma])
    assert not torch.equal(colour[:, ~luma], gray[:, ~luma])


def test_a_gray_file_has_most_of_the_luma_tokens_of_its_colour_version():
    tokenizer = make("sit")
    colour = (pixels() * 127.5 + 127.5).round().to(torch.uint8)
    gray = luma_of(colour).expand_as(colour)
    mine, other = (tokenizer.encode(image / 127.5 - 1).ids for image in (colour, gray))
    luma = of_planes(tokenizer, "luma")
    assert (mine[:, luma] == other[:, luma]).float().mean() > 0.9


@pytest.mark.parametrize("attention", CAUSAL)
def test_which_tokens_a_change_of_one_scale_reaches(attention):
    """Tests the combined masks: which encoder features change when the input of one scale changes."""
    tokenizer = make(attention)
    parts = tokenizer.analyse(pixels(1))

    def features(given):
        tokenizer.analyse = lambda image: given
        return tokenizer._by_scale(tokenizer._encode_features(pixels(1)))

    before = features(parts)
    for changed in range(6):
        moved = list(parts)
        moved[changed] = moved[changed] + torch.randn_like(moved[changed])
        after = features(moved)
        found = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        chroma, causal = changed % 2 == 1, CAUSAL[attention][0]
        wanted = [not (chroma and seeing % 2 == 0) and not (causal and seeing < changed) for seeing in range(6)]
        assert found == wanted, changed


@pytest.mark.parametrize("transform", ["haar", "bior2.2"])
def test_a_small_image_gives_the_first_scales(transform):
    tokenizer = make("sit-sce", transform=transform)
    full = tokenizer.encode(pixels()).ids
    assert tokenizer.layout.rungs == {(8, 8): 2, (16, 16): 4, (32, 32): 6}
    for number in tokenizer.layout.rungs.values():
        ids = tokenizer.encode(tokenizer.reference(pixels(), number)).ids
        assert ids.shape[1] == tokenizer.layout.prefix_length(number)
        assert (ids == full[:, : ids.shape[1]]).float().mean() > 0.999  # rounding may change a tie


@pytest.mark.parametrize("num_scales", [1, 2, 3, 4, 5])
def test_a_prefix_decodes_to_the_reference_of_the_full_decode(num_scales):
    tokenizer = make("sit-scd", transform="bior4.4")
    tokens = tokenizer.encode(pixels())
    parts = zip(tokenizer.quantizers, tokenizer._by_codebook(tokens.ids), strict=True)
    full = tokenizer._decode_features(tokenizer._in_order([quantizer.lookup(part) for quantizer, part in parts]))[0]
    prefix = tokenizer.decode(tokens.prefix(tokenizer.layout.prefix_length(num_scales)))
    assert prefix.shape[-2:] == tokenizer.layout.scales[num_scales - 1].image_size
    torch.testing.assert_close(prefix, tokenizer.reference(full, num_scales).clamp(-1, 1), atol=1e-4, rtol=0)


def test_the_first_scale_alone_is_a_gray_image():
    tokenizer = make("sit-sc")
    small = tokenizer.reference(pixels(), 1)
    assert (small.amax(1) - small.amin(1)).max() < 1e-5
    torch.testing.assert_close(small[:, :1], split_planes(tokenizer.reference(pixels(), 2))[:, :1])
    assert (tokenizer.reference(pixels(), 2).amax(1) - tokenizer.reference(pixels(), 2).amin(1)).max() > 0.1


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("quantizer", [FSQConfig(levels=[4, 3]), CosineVQConfig(codes=32, code_dim=8)])
def test_decode_of_encode_is_the_training_reconstruction(attention, quantizer):
    tokenizer = make(attention, quantizer=quantizer)
    output, tokens = tokenizer(pixels()), tokenizer.encode(pixels())
    assert torch.equal(output.ids, tokens.ids)
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), tokenizer.decode(tokens), atol=1e-5, rtol=1e-5)
    assert tokenizer.codes(tokens).shape[:2] == tokenizer.margins(pixels()).shape == tokens.ids.shape[:2]
    output.reconstruction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.heads.parameters())


def test_codebooks_are_put_back_where_their_tokens_were():
    tokenizer = make("sit-sc")
    for length in tokenizer.layout.ends_of_scales:
        sequence = torch.arange(length).expand(2, -1)
        parts = tokenizer._by_codebook(sequence)
        assert torch.equal(tokenizer._in_order(parts), sequence)
    assert parts[2][0].tolist() == [*range(20, 36), *range(40, 56)]  # luma of details


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = make("sit-sc")
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, tokenizer.config)
    loaded, metadata = load_tokenizer(tmp_path / "t.safetensors")
    assert TokenLayout.from_dict(metadata["layout"]) == tokenizer.layout
    assert torch.equal(loaded.encode(pixels()).ids, tokenizer.encode(pixels()).ids)


def test_chroma_can_be_drawn_under_known_luma():
    """Colorization in natural order: known luma is kept, chroma is drawn."""
    tokenizer = make()
    torch.manual_seed(0)
    config = TransformerPriorConfig(depth=1, width=32, heads=4, dropout=0.0)
    prior = build_prior(config, ClassConditionConfig(), tokenizer.layout, ["a", "b"]).eval()
    gray = tokenizer.encode(gray_of(pixels()))
    luma = of_planes(tokenizer, "luma")
    prompts = Prompts.of_labels(torch.zeros(4, dtype=torch.int64))
    drawn = sample(prior, prompts, SamplingConfig(), [0, 1, 2, 3], known=gray, keep=luma.expand(4, -1))
    assert torch.equal(drawn.ids[:, luma], gray.ids[:, luma])
    assert not torch.equal(drawn.ids[:, ~luma], gray.ids[:, ~luma])


@pytest.mark.parametrize(
    ("keys", "size", "channels", "message"),
    [
        ({"planes": "hsv"}, 32, 3, r"tokenizer.planes='hsv'; allowed: all, ycbcr"),
        ({"planes": "ycbcr"}, 32, 1, r"planes=ycbcr with images.channels=1: gray images have no chroma"),
        ({"planes": "ycbcr"}, 48, 3, r"4 scales with patch 2 and planes ycbcr need a multiple of 32 .nearest: 32, 64"),
    ],
)
def test_what_has_no_planes_is_named(keys, size, channels, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(SITConfig(**keys), (size, size), channels)
