"""SIT: geometry, scale causality, prefixes and their errors."""

import pytest
import torch

from data.layout import TokenLayout, Tokens
from stages.contract import PrefixUnsupported
from stages.factory import build_tokenizer
from stages.spectral.haar import haar_dwt, haar_idwt
from stages.tokenizer.quantizers import CosineVQConfig, FSQConfig
from stages.tokenizer.sit import SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig
from stages.weights import load_tokenizer, save_tokenizer

SMALL = TransformerConfig(depth=2, width=32, heads=4)


def make(attention="sit", quantizer=None, **keys):
    torch.manual_seed(0)
    config = SITConfig(attention=attention, encoder=SMALL, decoder=SMALL, quantizer=quantizer or FSQConfig(), **keys)
    tokenizer = build_tokenizer(config, (32, 32), 3)
    with torch.no_grad():  # new weights are near zero; with larger ones every token matters
        for parameter in tokenizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer.fit([(pixels(), None)])
    return tokenizer.eval()


def pixels(batch=4):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_patch_widths_sum_to_the_number_of_pixels():
    tokenizer = make(scales=4, patch=2)
    parts = tokenizer.analyse(pixels())
    assert [part.shape[1] for part in parts] == [4, 4, 4, 4]
    assert [part.shape[2] for part in parts] == [12, 36, 144, 576]
    assert sum(part[0].numel() for part in parts) == 3 * 32 * 32
    torch.testing.assert_close(tokenizer.synthesise(parts), pixels(), atol=1e-5, rtol=0)


def test_the_papers_shapes():
    for scales, patch, side, tokens, widths in [
        (4, 2, 256, 1024, [12, 36, 144, 576]),
        (5, 1, 256, 1280, [3, 9, 36, 144, 576]),
        (6, 1, 512, 1536, [3, 9, 36, 144, 576, 2304]),
    ]:
        with torch.device("meta"):
            tokenizer = build_tokenizer(SITConfig(scales=scales, patch=patch), (side, side), 3)
        assert tokenizer.layout.length == tokens
        assert [head.out_features for head in tokenizer.heads] == widths
        assert [scale.image_size[0] for scale in tokenizer.layout.scales] == [
            side >> (scales - 1 - k) for k in range(scales)
        ]


@pytest.mark.parametrize("attention", ["sit", "sit-sc", "sit-scd", "sit-sce"])
@pytest.mark.parametrize("quantizer", [FSQConfig(), CosineVQConfig(codes=64, code_dim=8)])
def test_decode_of_encode_is_the_training_reconstruction(attention, quantizer):
    tokenizer = make(attention, quantizer)
    output = tokenizer(pixels())
    tokens = tokenizer.encode(pixels())
    assert torch.equal(output.ids, tokens.ids)
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), tokenizer.decode(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sit", "sit-sce"])
def test_finer_details_leave_coarser_tokens_only_under_a_causal_encoder(attention):
    tokenizer = make(attention)
    bands = haar_dwt(pixels(), 3, "averaging")
    bands[2] = bands[2] + torch.randn_like(bands[2])  # scale 3 of 4
    changed = tokenizer.encode(haar_idwt(bands, "averaging")).ids
    end = tokenizer.layout.prefix_length(2)
    same = torch.equal(changed[:, :end], tokenizer.encode(pixels()).ids[:, :end])
    assert same == (attention == "sit-sce")


@pytest.mark.parametrize("num_scales", [1, 2, 3, 4])
def test_a_small_image_gives_the_first_scales(num_scales):
    tokenizer = make("sit-sce")
    full = tokenizer.encode(pixels()).ids
    small = tokenizer.encode(tokenizer.reference(pixels(), num_scales)).ids
    assert small.shape[1] == tokenizer.layout.prefix_length(num_scales)
    assert (small == full[:, : small.shape[1]]).float().mean() > 0.999  # rounding may change a tie


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_a_prefix_decodes_to_the_reduced_full_decode(num_scales):
    tokenizer = make("sit-scd")
    tokens = tokenizer.encode(pixels())
    parts = zip(tokenizer.quantizers, tokenizer._by_codebook(tokens.ids), strict=True)
    features = torch.cat([quantizer.lookup(part) for quantizer, part in parts], 1)
    full = tokenizer._decode_features(features)[0]
    prefix = tokenizer.decode(tokens.prefix(tokenizer.layout.prefix_length(num_scales)))
    assert prefix.shape[-2:] == tokenizer.layout.scales[num_scales - 1].image_size
    torch.testing.assert_close(prefix, tokenizer.reference(full, num_scales).clamp(-1, 1), atol=1e-4, rtol=0)


def test_approximation_and_details_have_weights_of_their_own():
    tokenizer = make()
    before = tokenizer(pixels()).reconstruction
    for block in tokenizer.decoder.blocks:
        first, second = block.query_key_value
        first.load_state_dict(second.state_dict())
    assert not torch.allclose(before, tokenizer(pixels()).reconstruction)
    shared = sum(p.numel() for p in make(specialised=False).encoder.blocks.parameters())
    assert sum(p.numel() for p in tokenizer.encoder.blocks.parameters()) == 2 * shared


def test_a_dense_encoder_or_decoder_refuses_prefixes():
    tokenizer = make("sit")
    with pytest.raises(PrefixUnsupported, match="sit-sce"):
        tokenizer.encode(pixels()[..., ::2, ::2])
    with pytest.raises(PrefixUnsupported, match="sit-scd"):
        tokenizer.decode(tokenizer.encode(pixels()).prefix(4))


def test_wrong_input_is_named():
    tokenizer = make("sit-sc")
    with pytest.raises(ValueError, match=r"20x20.*4x4, 8x8, 16x16, 32x32"):
        tokenizer.encode(torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="inside a scale"):
        tokenizer.decode(tokenizer.encode(pixels()).prefix(5))
    with pytest.raises(ValueError, match="id 1000"):
        tokenizer.decode(Tokens.fixed(torch.full((1, 16, 1), 1000)))
    with pytest.raises(ValueError, match=r"multiple of 16 .nearest: 32, 48"):
        build_tokenizer(SITConfig(), (40, 40), 3)
    with pytest.raises(ValueError, match="tokenizer.attention"):
        build_tokenizer(SITConfig(attention="causal"), (32, 32), 3)


def test_fit_measures_each_scale():
    tokenizer = make()
    parts = tokenizer.analyse(pixels(64))
    tokenizer.fit([(pixels(64), None)])
    for index, part in enumerate(parts):
        torch.testing.assert_close(tokenizer.scale_std[index], part.std(), rtol=0.01, atol=0)
    assert tokenizer.scale_mean[1:].abs().max() == 0


def test_raster_baseline_is_the_same_code():
    tokenizer = build_tokenizer(ViTVQGANConfig(encoder=SMALL, decoder=SMALL), (32, 32), 3).eval()
    assert tokenizer.layout.length == 16 and tokenizer.layout.codebooks == (0,)
    assert tokenizer.decode(tokenizer.encode(pixels())).shape == (4, 3, 32, 32)


def test_saved_and_loaded_is_the_same(tmp_path):
    tokenizer = make("sit-sc", CosineVQConfig(codes=32, code_dim=4))
    save_tokenizer(tmp_path / "t.safetensors", tokenizer, tokenizer.config)
    loaded, metadata = load_tokenizer(tmp_path / "t.safetensors")
    assert TokenLayout.from_dict(metadata["layout"]) == tokenizer.layout
    assert torch.equal(loaded.encode(pixels()).ids, tokenizer.encode(pixels()).ids)
