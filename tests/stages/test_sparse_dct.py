"""DCT list codec: JPEG's quality on real photos, exact round trips of lists and images, rungs, and invalid input."""

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from data.images.views import to_float, to_uint8
from data.layout import TokenLayout, Tokens
from stages.contract import RefusedImage
from stages.lists import ListGrammar
from stages.measures.distortion import psnr
from stages.measures.upsampling import reduce_to
from stages.spectral.dct import block_dct, block_idct, frequencies_by_shell, shell, zigzag
from stages.spectral.jpeg import quantization_table
from tests.stages.dct_lists import codec, noise

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")


@pytest.fixture(scope="module")
def photos():
    """Four 136x120 px crops of each of six photos, uint8 [24, 3, 136, 120]; chroma blocks do not fit evenly."""
    crops = []
    for name in PHOTOS:
        image = np.array(Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB"))
        for part in range(4):
            top, left = (image.shape[0] - 136) * part // 4, (image.shape[1] - 120) * (3 - part) // 4
            crops.append(torch.from_numpy(image[top : top + 136, left : left + 120]).permute(2, 0, 1))
    return torch.stack(crops)


@pytest.mark.parametrize(("chroma", "subsampling", "within"), [("4:4:4", 0, 0.1), ("4:2:0", 2, 0.3)])
@pytest.mark.parametrize("quality", [20, 50, 80, 95])
def test_as_far_from_real_photos_as_libjpeg(photos, quality, chroma, subsampling, within):
    coder = codec((136, 120), quality=quality, chroma=chroma)
    ours = psnr(to_uint8(coder.decode(coder.encode(to_float(photos)))), photos)
    decoded = []
    for photo in photos:
        file = io.BytesIO()
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling=subsampling)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    theirs = psnr(torch.stack(decoded), photos)
    assert (ours - theirs).abs().mean() < within / 2 and (ours.mean() - theirs.mean()).abs() < within / 2
    assert (ours - theirs).abs().max() < (within if quality < 95 else 0.3)


def test_nearest_chroma_is_not_what_libjpeg_does(photos):
    results = []
    for kind in ("triangle", "nearest"):
        coder = codec((136, 120), quality=80, chroma_upsampling=kind)
        results.append(psnr(to_uint8(coder.decode(coder.encode(to_float(photos)))), photos).mean())
    assert results[0] > results[1] + 0.1


def test_tables_are_those_of_the_standard():
    for quality in (1, 10, 49, 50, 51, 90, 100):
        jpeg = io.BytesIO()
        Image.new("RGB", (8, 8)).save(jpeg, "JPEG", quality=quality)
        found = Image.open(jpeg).quantization
        for chroma in (False, True):
            assert quantization_table(quality, chroma).int().tolist() == list(found[int(chroma)])


@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_the_transform_keeps_energy_and_comes_back(block):
    x = torch.randn(2, 3, 2 * block, 3 * block, dtype=torch.float64)
    found = block_dct(x, block)
    assert found.shape == (2, 3, block**2, 2, 3)
    assert torch.allclose(found.square().sum(), x.square().sum())
    assert torch.allclose(block_idct(found, block), x)
    assert torch.allclose(found[:, :, 0], block * torch.nn.functional.avg_pool2d(x, block))


def test_frequencies_come_by_octave_and_in_zigzag():
    assert zigzag(8)[:10] == (0, 1, 8, 16, 9, 2, 3, 10, 17, 24)
    order = frequencies_by_shell(8)
    assert sorted(order) == list(range(64)) and order[:4] == (0, 1, 8, 9)
    assert [shell(f, 8) for f in order] == [0] + [1] * 3 + [2] * 12 + [3] * 48


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (21, 13), (5, 3), (1, 1)])
@pytest.mark.parametrize("block", [2, 4, 8, 16])
def test_lists_and_quantised_images_are_inverse(channels, size, block):
    """Includes sides that blocks do not divide, and sides smaller than a block."""
    coder = codec(size, channels, block=block, quality=90)
    images = noise(5, size, channels)
    values, lowered = coder.quantise(coder.to_coefficients(images))
    tokens = coder.encode(images)
    assert torch.equal(coder.to_values(tokens), values) and torch.equal(lowered, torch.zeros(5).long())
    again = coder.to_list(values, lowered)
    assert torch.equal(again.ids, tokens.ids) and torch.equal(again.lengths, tokens.lengths)
    assert torch.equal(tokens.lengths, 1 + (values != 0).sum(1))
    decoded = coder.decode(tokens)
    assert decoded.shape == images.shape
    steps = coder.tables(0)[coder.channel_of]
    assert torch.equal(decoded, coder.to_pixels(values * steps))


def test_gray_all_over_is_an_empty_list():
    coder = codec(channels=1)
    tokens = coder.encode(noise(1, channels=1))
    assert tokens.lengths.tolist() == [1] and tokens.ids[0].tolist() == [[64, 0, coder.largest]]
    assert to_uint8(coder.decode(tokens)).unique().tolist() == [128]
    nothing = coder.decode(Tokens(tokens.ids[:, :0], tokens.lengths * 0, tokens.header))
    assert torch.equal(nothing, coder.decode(tokens))


@pytest.mark.parametrize("order", ["natural", "luma_first"])
def test_lists_rise_in_every_order(order):
    coder = codec(block=4)
    tokens = coder.encode(noise(6))
    grammar = ListGrammar(**{k: v for k, v in coder.layout.grammar.items() if k != "kind"}, order=order)
    sorted_, taken = grammar.sort(tokens)
    grammar.annotate(sorted_)  # raises for an illegal element
    back, _ = coder.grammar.sort(sorted_)
    assert torch.equal(back.ids.masked_fill(~tokens.counted[..., None], 0), tokens.ids)
    for row in range(len(tokens)):
        length = int(tokens.lengths[row])
        assert sorted(taken[row, :length].tolist()) == list(range(length))
        channels = sorted_.ids[row, : length - 1, 0]
        planes = (grammar.plane_of[channels] > 0).int()
        if order == "luma_first":
            assert torch.equal(planes, planes.sort().values)
        for plane in (0, 1):
            # within luma and within chroma the order is the natural one
            mine = tokens.ids[row, : length - 1][(grammar.plane_of[tokens.ids[row, : length - 1, 0]] > 0) == plane]
            assert torch.equal(mine, sorted_.ids[row, : length - 1][planes == plane])


def test_bands_hold_luma_then_chroma():
    coder = codec((32, 32))
    names = [scale.name for scale in coder.layout.scales]
    assert names[:4] == ["1x1 luma", "1x1 chroma", "2x2 luma", "2x2 chroma"] and names[-1] == "8x8 chroma"
    assert [scale.length for scale in coder.layout.scales] == [16, 8, 48, 24, 192, 96, 768, 385]
    planes = [coder.channel_table[c].plane for c in range(3)]
    assert planes == [0, 1, 2] and coder.layout.length == 32 * 32 * 3 // 2 + 1
    assert TokenLayout.from_dict(coder.layout.to_dict()) == coder.layout


@pytest.mark.parametrize("channels", [1, 3])
def test_bands_are_smaller_images(photos, channels):
    """An image reduced in the cosine domain gives the first scales of the large one, up to rounding to 8 bits; an image
    reduced by averaging gives about the same."""
    # avoid black and white, where overshoot of the cosines would be clipped
    images = 0.6 * to_float(photos[:8, :channels, :128, :112])
    coder = codec((128, 112), channels, quality=90)
    full, kinds = coder.encode(images), 1 if channels == 1 else 2
    for side, scales in ((2, 2 * kinds), (4, 3 * kinds)):
        size = (128 * side // 8, 112 * side // 8)
        assert coder.layout.rungs[size] == scales
        small = codec(size, channels, block=side, quality=90)
        exact = coder.to_coefficients(images)[:, coder.grammar.scale_of[coder.channel_of] < scales]
        rung = small.to_pixels(exact * side / 8)
        prefix, found = coder.first_scales(full, scales), coder.encode(rung)
        wanted, got = coder.to_values(prefix), coder.to_values(found)
        assert (wanted - got).abs().max() <= (2 if channels == 1 else 6) and (wanted != got).float().mean() < 0.06
        assert int(coder.grammar.scales(found)[found.counted].max()) < scales
        averaged = coder.to_values(coder.encode(torch.nn.functional.avg_pool2d(images, 8 // side)))
        assert (wanted - averaged).abs().double().mean() < 0.5 * wanted.abs().double().mean()
    for scales in range(1, len(coder.layout.scales) + 1):
        reference = coder.reference(images, scales)
        decoded = coder.decode(coder.first_scales(full, scales))
        assert psnr(to_uint8(reference), to_uint8(decoded)).min() > 30


def test_the_range_of_values_is_measured_and_what_lies_beyond_is_counted():
    coder = codec(channels=1)
    quiet, loud = noise(9, channels=1)[:5], noise(9, channels=1)[5:]
    assert coder.encode(loud).remarks["values_clipped"].sum() == 0  # before fitting, every value is in range
    coder.fit([(quiet, torch.zeros(5))])
    values = coder.quantise(coder.to_coefficients(quiet))[0]
    assert coder.largest == values.abs().max()
    tokens = coder.encode(torch.cat([quiet, loud]))
    beyond = (coder.quantise(coder.to_coefficients(loud))[0].abs() > coder.largest).sum(1)
    assert beyond.sum() > 0
    assert torch.equal(tokens.remarks["values_clipped"], torch.cat([torch.zeros(5).long(), beyond]))
    assert coder.decode(tokens).isfinite().all()
    other = codec(channels=1)
    other.restore(coder.statistics())
    assert other.layout == coder.layout and torch.equal(other.encode(loud).ids, coder.encode(loud).ids)


def test_lists_beyond_the_cap():
    images = noise(6, (32, 32), 1)
    refusing = codec((32, 32), 1, max_length=300)
    with pytest.raises(RefusedImage, match=r"image 2 of the batch: a list of \d+ elements at quality 50.*lower"):
        refusing.encode(images)
    lowering = codec((32, 32), 1, max_length=300, overflow="lower")
    tokens = lowering.encode(images)
    assert tokens.lengths.max() <= 300 and tokens.header[0, 0] == 0 and tokens.header[-1, 0] > 0
    assert torch.equal(tokens.remarks["images_of_lower_quality"], (tokens.header[:, 0] > 0).long())
    for row, lowered in enumerate(tokens.header[:, 0].tolist()):
        plain = codec((32, 32), 1, quality=50 >> lowered)
        plain._set_range(lowering.largest)
        assert torch.equal(lowering.decode(tokens[row : row + 1]), plain.decode(plain.encode(images[row : row + 1])))
    lowering.fit([(images, torch.zeros(6))])
    drawn = lowering.start_prefix(torch.zeros(500).long(), range(500)).header[:, 0]
    shares = torch.bincount(drawn, minlength=6) / 500
    wanted = torch.bincount(tokens.header[:, 0], minlength=6) / 6
    assert (shares - wanted).abs().max() < 0.1
    bits = lowering.header_bits(tokens, torch.zeros(6))
    assert (bits > 0).all() and bits.mean() < 3
    with pytest.raises(ValueError, match="no image whose values could be measured"):
        lowering.fit([])
    with pytest.raises(RefusedImage, match="at quality 1"):
        codec((32, 32), 1, max_length=2, overflow="lower").encode(images)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quality": 0}, "quality=0; allowed: 1 to 100"),
        ({"quality": 101}, "quality=101; allowed: 1 to 100"),
        ({"block": 3}, "block=3; allowed: 2, 4, 8, 16"),
        ({"chroma": "4:1:1"}, "allowed: 4:2:0, 4:4:4"),
        ({"chroma_upsampling": "cubic"}, "allowed: triangle, nearest"),
        ({"overflow": "cut"}, "allowed: refuse, lower"),
        ({"max_length": -1}, "max_length=-1"),
        ({"channels": 2}, "2 channels; allowed: 1 or 3"),
    ],
)
def test_settings_that_cannot_be(keys, message):
    with pytest.raises(ValueError, match=message):
        codec(**keys)


def test_images_of_another_size_or_colour():
    with pytest.raises(ValueError, match=r"images \(1, 16, 16\); allowed: 3 channels of 2x2, 4x4, 8x8, 16x16"):
        codec().encode(noise(1, channels=1))
    with pytest.raises(ValueError, match=r"images \(3, 12, 16\)"):
        codec().encode(noise(1, (12, 16)))


ILLEGAL = {
    "a channel that falls": ([(5, 0, 1), (4, 0, 1)], 1),
    "a position that falls": ([(3, 2, 1), (3, 1, 1)], 1),
    "a place twice": ([(3, 2, 1), (3, 2, 2)], 1),
    "a value of nothing": ([(0, 0, 1), (3, 2, 0)], 1),
    "a channel that is none": ([(65, 0, 1)], 0),
    "a channel below none": ([(-1, 0, 1)], 0),
    "a position that is none": ([(0, 0, 1), (1, 4, 1)], 1),
    "a value out of range": ([(0, 0, 10_000)], 0),
    "something after the end": ([(0, 0, 1), (64, 0, 0), (3, 0, 1)], 2),
    "an end with a value": ([(0, 0, 1), (64, 0, 3)], 1),
    "an end somewhere": ([(64, 2, 0)], 0),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_lists_that_cannot_be_are_refused_at_the_first_offence(name):
    elements, place = ILLEGAL[name]
    coder = codec(channels=1)
    good = coder.encode(noise(4, channels=1)[3:])  # longer, so the other list is padded
    ids = torch.tensor([*elements, (20, 0, 1)])[None] + torch.tensor([0, 0, coder.largest])
    tokens = Tokens.cat([good, Tokens(ids, torch.tensor([len(elements) + 1]), good.header)])
    with pytest.raises(ValueError, match=rf"list 1: element {place} .* cannot stand there"):
        coder.decode(tokens)


def test_a_header_that_cannot_be():
    coder = codec(channels=1, overflow="lower")
    tokens = coder.encode(noise(2, channels=1))
    tokens.header[1] = 9
    with pytest.raises(ValueError, match="allowed: 0 to 5 halvings"):
        coder.decode(tokens)


def test_random_lists_are_decoded_or_refused():
    coder, generator = codec(block=2, size=(8, 8)), torch.Generator().manual_seed(0)
    sizes = [part.vocabulary_size for part in coder.layout.scales[0].fields]
    decoded = 0
    for length in (1, 2, 3, 8):
        ids = torch.stack([torch.randint(0, size, (500, length), generator=generator) for size in sizes], dim=-1)
        for row in ids:
            try:
                values = coder.to_values(Tokens.fixed(row[None]))
            except ValueError:
                continue
            decoded += 1
            rest = coder.to_list(values, torch.zeros(1).long())
            closed = int(row[-1, 0]) == coder.grammar.end
            assert torch.equal(rest.ids[0, : length - closed], row[: length - closed])
    assert decoded > 50


def test_reduced_photos_are_taken_as_rungs(photos):
    coder = codec((128, 128), quality=50)
    square = torch.nn.functional.pad(photos[:2, :, :128], (0, 8))
    tokens = coder.encode(to_float(reduce_to(square, 64)))
    assert tokens.lengths.max() > 1 and int(coder.grammar.scales(tokens)[tokens.counted].max()) == 5
    assert psnr(to_uint8(coder.decode(tokens)), square).min() > 18
