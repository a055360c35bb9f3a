"""Arbitrary-resolution head: one-sided spectra, one function at all sizes, seamless tiles, unchanged tokens."""

import pytest
import torch
from torch.nn import functional

from stages.contract import PrefixUnsupported
from stages.factory import build_head, build_tokenizer
from stages.spectral.dct import lowpass
from stages.tokenizer import heads
from stages.tokenizer.heads import SHARPNESS, WaveletHeadConfig, carriers, complex_mixture
from stages.tokenizer.nested import NestedConfig
from stages.tokenizer.quantizers import CosineVQConfig
from stages.tokenizer.sit import SITConfig
from stages.tokenizer.transformer import TransformerConfig
from tests.stages.bitplanes import codec

SMALL = TransformerConfig(depth=1, width=32, heads=4)


def pixels(batch=2, side=32):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 3, side // 4, side // 4, generator=generator) * 2 - 1
    return functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


def make(kind="sit", attention="sit", **keys):
    torch.manual_seed(0)
    part = {"encoder": SMALL, "decoder": SMALL, "head": WaveletHeadConfig(**keys)}
    if kind == "sit":
        config = SITConfig(scales=3, patch=2, attention=attention, **part)
    else:
        config = NestedConfig(num_tokens=6, patch=8, **part)
    tokenizer = build_tokenizer(config, (32, 32), 3)
    with torch.no_grad():
        for parameter in tokenizer.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer.fit([(pixels(), None)])
    return tokenizer.eval()


# ---------------------------------------------------------------------- the wavelets


def field_of(head, family, extent=16.0, points=256):
    """Band-pass part of one cell over [-extent, extent)², after the products: complex [points, points]."""
    axis = (torch.arange(points) - points / 2) * (2 * extent / points)
    y, x = axis[:, None].expand(points, points), axis.expand(points, points)
    shape = (1, 2, 2, head.carriers.shape[1], points, points)
    generator = torch.Generator().manual_seed(0)
    place = torch.tanh(torch.randn(*shape[:4], 1, 1, generator=generator)).expand(shape)
    strength = torch.randn(*shape[:4], 1, 1, generator=generator).expand(shape)
    out = head.out.detach().clone()
    out[1 - family] = 0
    values = []
    # the imaginary part of z is the real part of -i z
    for weights in (out, torch.stack([out[:, 1], -out[:, 0]], dim=1)):
        head.out.data = weights
        values.append(head.band_pass(place, strength, y, x)[0, 0])
    return torch.complex(*values).detach()


def spectrum_of(field, extent=16.0):
    """(frequencies in radians per cell, shares of energy [points, points])."""
    energy = torch.fft.fft2(field).abs().square()
    return torch.fft.fftfreq(len(field), 2 * extent / len(field)) * 2 * torch.pi, energy / energy.sum()


@pytest.mark.parametrize("family", [0, 1])
@pytest.mark.parametrize("square", [0.0, 1.0])
def test_the_band_pass_part_is_one_sided_and_squares_stay_there(family, square):
    head = make().head
    head.square.data.fill_(square)
    field = field_of(head, family)
    frequencies, share = spectrum_of(field)
    along = frequencies[:, None].expand_as(share) if family == 0 else frequencies.expand_as(share)
    across = frequencies.expand_as(share) if family == 0 else frequencies[:, None].expand_as(share)
    assert share[along <= 0].sum() < 1e-4
    # nearly all energy is in the carriers' quarter of the plane, widened by two standard deviations of an atom's energy
    assert share[across.abs() <= along * (1 + 4 * SHARPNESS)].sum() > 0.98
    low = (along**2 + across**2).sqrt() < head.carriers.norm(dim=-1).min() * 0.1
    assert share[low].sum() < 1e-4
    # why the field is complex: the square of a real field has low frequencies
    assert spectrum_of(field.square())[1][low].sum() < 1e-4
    assert spectrum_of(field.real.square())[1][low].sum() > 1e-3


def test_carriers_are_octaves_in_two_quarters_of_the_plane():
    found = carriers(3, 2)
    assert found.shape == (2, 12, 2)
    lengths = sorted({round(float(length), 4) for length in found.norm(dim=-1).flatten()})
    assert lengths == pytest.approx([torch.pi / 2, torch.pi, 2 * torch.pi], abs=1e-3)
    assert (found[0, :, 0] > found[0, :, 1].abs()).all() and (found[1, :, 1] > found[1, :, 0].abs()).all()


def test_pairs_multiply_like_complex_numbers():
    weights, x = torch.randn(2, 2, 5, 3), torch.randn(4, 2, 2, 3, 6, 7)
    wanted = torch.einsum(
        "fkt,bfthw->bfkhw", torch.complex(weights[:, 0], weights[:, 1]), torch.complex(x[:, :, 0], x[:, :, 1])
    )
    found = complex_mixture(weights, x)
    torch.testing.assert_close(torch.complex(found[:, :, 0], found[:, :, 1]), wanted)


# ---------------------------------------------------------------------- one function


@pytest.mark.parametrize("kind", ["sit", "nested"])
@pytest.mark.parametrize("times", [3, 5])
def test_two_resolutions_agree_on_the_common_grid(kind, times):
    tokenizer = make(kind)
    tokens = tokenizer.encode(pixels())
    small, large = (tokenizer.render(tokens, (32 * n, 32 * n)) for n in (1, times))
    middle = times // 2
    torch.testing.assert_close(large[..., middle::times, middle::times], small, atol=1e-4, rtol=0)
    assert small.std() > 0.01


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (7, 5), (300, 517)])
def test_a_crop_is_the_part_of_the_whole_and_tiles_meet(size, monkeypatch):
    tokenizer = make()
    tokens = tokenizer.encode(pixels())
    whole = tokenizer.render(tokens, size)
    assert whole.shape == (2, 3, *size) and whole.abs().max() <= 1
    top, left, height, width = 2, 1, size[0] - 4, size[1] - 3
    part = tokenizer.render(tokens, size, (top, left, height, width))
    torch.testing.assert_close(part, whole[:, :, top : top + height, left : left + width], atol=1e-5, rtol=0)
    monkeypatch.setattr(heads, "TILE_POINTS", 37)
    if size != (300, 517):
        torch.testing.assert_close(tokenizer.render(tokens, size), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [24, 16, 8, 1])
def test_a_smaller_output_is_the_mean_of_its_pixels(side):
    tokenizer = make()
    tokens = tokenizer.encode(pixels(4))
    fine = tokenizer.render(tokens, (192, 192))
    wanted = functional.interpolate(fine, (side, side), mode="area")
    step = 192 // side
    points = fine[..., step // 2 :: step, step // 2 :: step]
    error = (tokenizer.render(tokens, (side, side)) - wanted).square().mean()
    assert error < 0.5 * (points - wanted).square().mean()


# ---------------------------------------------------------------------- training and invalid input


@pytest.mark.parametrize("kind", ["sit", "nested"])
def test_its_loss_reaches_the_head_alone_and_all_of_it(kind):
    tokenizer = make(kind).train()
    output = tokenizer(pixels(), pixels(side=64))
    output.losses["head"].backward()
    for name, parameter in tokenizer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("head."), name


@pytest.mark.parametrize("crop", [8, 64])
def test_what_it_should_be_is_the_part_of_the_larger_image_that_it_renders(monkeypatch, crop):
    """Images encode position: rows in red, columns in green."""
    tokenizer = make(crop=crop)
    ramp = torch.linspace(-1, 1, 96)
    large = torch.stack([ramp[:, None].expand(96, 96), ramp.expand(96, 96), torch.zeros(96, 96)]).expand(2, 3, 96, 96)
    seen = []

    def answer(found, size, part):
        seen.append((size, part))
        rows, columns = (
            (torch.arange(first, first + count) + 0.5) / side * 2 - 1
            for first, count, side in zip(part[:2], part[2:], size, strict=True)
        )
        grid = torch.stack([rows[:, None].expand(-1, len(columns)), columns.expand(len(rows), -1)])
        return torch.cat([grid, torch.zeros(1, len(rows), len(columns))]).expand(2, -1, -1, -1)

    monkeypatch.setattr(tokenizer.head, "tile", answer)
    places = torch.zeros(2, 16, 96)
    for _ in range(20):
        assert tokenizer.head.losses(places, pixels(), large)["head"] < 1e-3
    assert len({size for size, _ in seen}) > 5 and all(32 <= size[0] <= 96 for size, _ in seen)
    assert crop == 64 or len({part[:2] for _, part in seen}) > 10


def test_nested_prefixes_ask_it_for_their_own_frequencies_of_the_larger_image(monkeypatch):
    tokenizer = make("nested").train()
    asked = {}
    monkeypatch.setattr(tokenizer, "draw_lengths", lambda count: torch.tensor([2, 6]))
    monkeypatch.setattr(tokenizer.head, "losses", lambda places, made, large: asked.update(large=large) or {})
    large = pixels(side=64)
    tokenizer(pixels(), large)
    assert torch.equal(asked["large"][1], large[1])
    wanted = lowpass(large, tokenizer.widths[1].expand(2))[0]
    assert torch.equal(asked["large"][0], wanted) and not torch.equal(wanted, large[0])


def test_without_a_head_there_is_no_loss_and_the_same_tokens():
    torch.manual_seed(0)
    bare = build_tokenizer(SITConfig(scales=3, patch=2, encoder=SMALL, decoder=SMALL), (32, 32), 3)
    assert "head" not in bare.train()(pixels()).losses
    headed = make()
    missing = headed.load_state_dict(bare.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("head.") for name in missing)
    bare.eval()
    assert torch.equal(bare.encode(pixels()).ids, headed.encode(pixels()).ids)
    assert torch.equal(bare.decode(bare.encode(pixels())), headed.decode(headed.encode(pixels())))


def test_a_head_learns_to_give_the_pixels_back_that_it_sees():
    tokenizer = make()
    places = torch.zeros(2, 16, 96)
    optimizer = torch.optim.Adam(tokenizer.head.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        tokenizer.head.losses(places, pixels(), pixels())["head"].backward()
        optimizer.step()
    error = (tokenizer.head.render(places, pixels(), (32, 32)) - pixels()).square().mean()
    assert error < 0.06 * pixels().var()


def test_bfloat16_is_near():
    tokenizer = make()
    tokens = tokenizer.encode(pixels())
    wanted = tokenizer.render(tokens, (40, 40))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tokenizer.render(tokens, (40, 40)).float(), wanted, atol=0.1, rtol=0)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_tile_is_one_compiled_graph(backend):
    tokenizer = make()
    tokens = tokenizer.encode(pixels())
    wanted = tokenizer.render(tokens, (40, 40))
    plain, places = tokenizer.decode_places(tokens)
    found = tokenizer.head.surroundings(places, plain)
    torch.compiler.reset()  # remove what other tests have compiled
    traced = torch.compile(tokenizer.head.tile, backend=backend, fullgraph=True, dynamic=False)
    torch.testing.assert_close(traced(found, (40, 40), (0, 0, 40, 40)).clamp(-1, 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "crop", "message"),
    [
        ((0, 5), None, "size=0x5; allowed: 1 to 16384"),
        ((5, 20000), None, "size=5x20000"),
        ((40, 40), (0, 30, 10, 11), r"crop=0,30,10,11 .* lies outside of 40x40"),
        ((40, 40), (-1, 0, 10, 10), "crop=-1"),
        ((40, 40), (0, 0, 0, 10), "crop=0,0,0,10"),
    ],
)
def test_sizes_and_crops_that_are_none(size, crop, message):
    tokenizer = make()
    with pytest.raises(ValueError, match=message):
        tokenizer.render(tokenizer.encode(pixels()), size, crop)


def test_what_has_no_head_says_so():
    bare = build_tokenizer(SITConfig(scales=3, patch=2, encoder=SMALL, decoder=SMALL), (32, 32), 3)
    with pytest.raises(ValueError, match="train one with tokenizer.head.kind=wavelet"):
        bare.render(bare.encode(pixels()), (40, 40))
    coded = codec()
    with pytest.raises(ValueError, match="a codec decodes at its own size only"):
        coded.render(coded.encode(torch.zeros(1, 1, 16, 16)), (40, 40))
    with pytest.raises(PrefixUnsupported, match="another size needs all scales"):
        tokenizer = make(attention="sit-scd")
        tokenizer.render(tokenizer.encode(pixels()).prefix(16), (40, 40))
    with pytest.raises(ValueError, match=r"head.cell=3; allowed: a divisor of the patch side, 8"):
        make(cell=3)
    with pytest.raises(ValueError, match="head.rings=0"):
        make(rings=0)
    with pytest.raises(ValueError, match="allowed: none, wavelet"):
        build_head(WaveletHeadConfig(kind="siren"), 8, 8, (2, 2), 3)


def test_a_prefix_of_nested_tokens_renders_too():
    tokenizer = make("nested")
    assert tokenizer.render(tokenizer.encode(pixels()).prefix(2), (50, 40)).shape == (2, 3, 50, 40)


def test_a_frozen_codebook_neither_starts_nor_revives():
    quantizer = build_tokenizer(
        SITConfig(scales=3, patch=2, encoder=SMALL, decoder=SMALL, quantizer=CosineVQConfig(codes=16, code_dim=4)),
        (32, 32),
        3,
    ).train()
    quantizer.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(pixels())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
