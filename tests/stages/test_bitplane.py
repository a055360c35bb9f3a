"""Bit-planes: known figures, a reference implementation of the paper, round trips, starts, and invalid input."""

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import pywt
import torch

from data.images.config import ImagesConfig
from data.images.fashion import FashionSource
from data.images.sources import open_source
from data.images.views import to_float, to_uint8
from data.layout import Tokens
from stages.codecs.scan import NEIGHBOURS, scan_of
from stages.spectral.colour import to_rgb, to_ycbcr
from stages.spectral.nested import levels_of, nested_dwt, nested_idwt
from tests.stages.bitplanes import VARIANTS, codec, noise, smooth


def matrix_of(pixels, wavelet="haar"):
    side = pixels.shape[-1]
    with pytest.warns(UserWarning, match="boundary effects") if wavelet != "haar" else nullcontext():
        bands = pywt.wavedec2(pixels, wavelet, mode="periodization", level=levels_of(side), axes=(-2, -1))
    return pywt.coeffs_to_array(bands, axes=(-2, -1))[0]


# ------------------------------------------------------------------------------------------------ known figures


@pytest.mark.fashion
@pytest.mark.parametrize(
    ("wavelet", "longest", "mean"), [("bior4.4", 3098, 1723.91), ("haar", 3217, 1822.47)], ids=["bior4.4", "haar"]
)
def test_the_papers_figures_on_all_70_000_images(wavelet, longest, mean):
    """The paper: at most 3098 tokens (bior4.4), 1822.5 on average (Haar). The other figures are from this code."""
    sources = [open_fashion(split) for split in ("train", "val")]
    tokenizer = codec(side=32, wavelet=wavelet)
    lengths = []
    for source in sources:
        for start in range(0, len(source), 2000):
            pixels = np.pad(source.images[start : start + 2000], ((0, 0), (2, 2), (2, 2)))
            lengths.append(tokenizer.encode(to_float(torch.from_numpy(pixels).unsqueeze(1))).lengths)
    found = torch.cat(lengths)
    assert len(found) == 70_000 and int(found.max()) == longest
    assert round(float(found.double().mean()), 2) == mean


def open_fashion(split):
    source = open_source(ImagesConfig(kind="fashion", size=32, channels=1, eval_view="pad"), split)
    assert isinstance(source, FashionSource)
    return source


def test_the_papers_arithmetic():
    """a = -17.45 with T = 16 is Negative and decodes to -24; in the next plane 16 < |a| < 24 refines it to -20."""
    tokenizer = codec(side=64, final_threshold=8.0)
    values = np.zeros((1, 64 * 64))
    values[0, 0] = -17.45
    tokens = tokenizer.encode_coefficients(values, np.array([2]))
    names = [tokenizer.grammar.names[token] for token in tokens.ids[0, :, 0].tolist()]
    blocks = 64 * 64 // 16
    first = ["Negative", *["Insignificant"] * 3, *["Group2x2"] * 3, *["Group4x4"] * (blocks - 1)]
    assert names == first + ["Lower", *first[1:]]
    assert tokenizer.decode_coefficients(tokens)[0, 0] == -20
    assert tokenizer.decode_coefficients(tokens.prefix(1))[0, 0] == -24


# ------------------------------------------------------------------------------------- reference implementation


def scan_by_hand(side):
    """The coarse 4x4 corner, then per level the bands high along y, along x and along both, as blocks of groups."""
    corner = [(y + top, x + left) for top, left in ((0, 0), (2, 0), (0, 2), (2, 2)) for y in (0, 1) for x in (0, 1)]
    blocks = [[corner[i : i + 4] for i in range(0, 16, 4)]]
    half = 4
    while half < side:
        for top, left in ((half, 0), (0, half), (half, half)):
            for y in range(top, top + half, 4):
                for x in range(left, left + half, 4):
                    blocks.append(
                        [[(y + b + c, x + d + e) for c in (0, 1) for e in (0, 1)] for b in (0, 2) for d in (0, 2)]
                    )
        half *= 2
    return blocks


def planes_by_hand(matrix, final):
    top = np.abs(matrix).max()
    threshold = 2.0 ** (np.ceil(np.log2(top)) - 1)
    while threshold >= final:
        yield threshold
        threshold /= 2


def refine(matrix, approximation, place, threshold):
    up = abs(matrix[place]) > abs(approximation[place])
    approximation[place] += np.sign(approximation[place]) * (threshold / 2 if up else -threshold / 2)
    return "Upper" if up else "Lower"


def blocks_by_hand(matrix, final):
    approximation, found = np.zeros_like(matrix), []
    for threshold in planes_by_hand(matrix, final):
        for block in scan_by_hand(len(matrix)):
            if all(abs(matrix[place]) < threshold for group in block for place in group):
                found.append("Group4x4")
                continue
            for group in block:
                if all(abs(matrix[place]) < threshold for place in group):
                    found.append("Group2x2")
                    continue
                found += [one_by_hand(matrix, approximation, place, threshold) for place in group]
    return found


def one_by_hand(matrix, approximation, place, threshold):
    if approximation[place]:
        return refine(matrix, approximation, place, threshold)
    if abs(matrix[place]) < threshold:
        return "Insignificant"
    approximation[place] = np.sign(matrix[place]) * 1.5 * threshold
    return "Positive" if matrix[place] > 0 else "Negative"


def tree(place, side):
    y, x = place
    if max(place) * 2 >= side:
        return []
    children = [(2 * y + b, 2 * x + c) for b in (0, 1) for c in (0, 1)]
    return children + [under for child in children for under in tree(child, side)]


def zerotree_by_hand(matrix, final):
    approximation, found, side = np.zeros_like(matrix), [], len(matrix)
    for threshold in planes_by_hand(matrix, final):
        covered = set()
        for place in (place for block in scan_by_hand(side) for group in block for place in group):
            under = tree(place, side) if max(place) > 1 else []
            if place in covered:
                continue
            if under and all(abs(matrix[each]) < threshold for each in (place, *under)):
                covered.update(under)
                found.append("ZeroTree")
            else:
                found.append(one_by_hand(matrix, approximation, place, threshold))
    return found


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
@pytest.mark.parametrize(("variant", "by_hand"), [("blocks", blocks_by_hand), ("zerotree", zerotree_by_hand)])
@pytest.mark.parametrize("pixels", [noise(3), smooth(3)], ids=["noise", "smooth"])
def test_streams_are_those_of_the_paper_written_down_again(wavelet, variant, by_hand, pixels):
    tokenizer = codec(variant, wavelet=wavelet)
    tokens = tokenizer.encode(to_float(pixels))
    for row, image in enumerate(pixels[:, 0].double().numpy() / 255):
        expected = by_hand(matrix_of(image, wavelet), 0.0625)
        assert int(tokens.lengths[row]) == len(expected)
        assert [tokenizer.grammar.names[token] for token in tokens.ids[row, : len(expected), 0]] == expected


def test_transforms_are_pywavelets_own():
    pixels = noise(2, 32, 3).double().numpy() / 255
    for wavelet in ("haar", "bior4.4"):
        found = nested_dwt(pixels, wavelet)
        assert np.array_equal(found, matrix_of(pixels, wavelet))
        assert np.abs(nested_idwt(found, wavelet) - pixels).max() < 1e-10  # bior4.4 filters are given to 12 digits


def test_the_scan_knows_parents_children_and_neighbours():
    scan = scan_of(16, 3)
    assert sorted(scan.order.tolist()) == list(range(3 * 256))
    channel, flat = np.divmod(scan.order, 256)
    row, column = np.divmod(flat, 16)
    one = {(c, y, x): index for index, (c, y, x) in enumerate(zip(channel, row, column, strict=True))}
    names = dict(zip(NEIGHBOURS, scan.neighbours.T, strict=True))
    # (channel 1, row 9, column 3) is in the finest band high along y: rows 8 to 15, columns 0 to 7
    place = one[1, 9, 3]
    assert (scan.level[place], scan.band[place]) == (3, 1)
    assert scan.parent[place] == one[1, 4, 1] and scan.child[one[1, 4, 1]] == one[1, 8, 2]
    assert scan.child[place] == -1 and scan.child[one[0, 0, 1]] == -1
    expected = {"left": (1, 9, 2), "right": (1, 9, 4), "up": (1, 8, 3), "down": (1, 10, 3), "parent": (1, 4, 1)}
    expected |= {"next band": (1, 1, 11), "last band": (1, 9, 11), "next plane": (2, 9, 3), "last plane": (0, 9, 3)}
    assert {name: names[name][place] for name in expected} == {name: one[at] for name, at in expected.items()}
    # there are no neighbors across the border of a band
    assert names["up"][one[1, 8, 3]] == -1 and names["right"][one[1, 9, 7]] == -1
    assert np.allclose(scan.place[place], [1.5 / 8, 3.5 / 8])


def test_colour_is_jpegs():
    reds = np.zeros((1, 3, 1, 2))
    reds[0, 0, 0, 0] = 1
    assert np.allclose(to_ycbcr(reds)[0, :, 0], [[0.299, 0], [-0.168736, 0], [0.5, 0]], atol=1e-6)
    pixels = np.random.default_rng(0).random((2, 3, 4, 4))
    assert np.abs(to_rgb(to_ycbcr(pixels)) - pixels).max() < 1e-14


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
@pytest.mark.parametrize("channels", [1, 3])
def test_errors_keep_the_bound_and_the_finest_threshold_is_exact(variant, wavelet, channels):
    pixels = torch.cat([noise(3, 16, channels), smooth(3, 16, channels)])
    for final in (0.5, 0.0625):
        tokenizer = codec(variant, channels=channels, wavelet=wavelet, final_threshold=final)
        values = tokenizer.to_coefficients(to_float(pixels))
        found = tokenizer.decode_coefficients(tokenizer.encode(to_float(pixels)))
        seen = found != 0
        assert seen.any() and np.abs(found - values)[seen].max() <= final / 2
        assert np.abs(values[~seen]).max() < final
    fine = codec(variant, channels=channels, wavelet=wavelet, final_threshold=2**-12)
    assert torch.equal(to_uint8(fine.decode(fine.encode(to_float(pixels)))), pixels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_prefix_decodes_and_planes_come_closer(variant):
    tokenizer, pixels = codec(variant, channels=3), smooth(2, 16, 3)
    tokens = tokenizer.encode(to_float(pixels))
    for length in range(0, int(tokens.lengths.max()), 37):
        decoded = tokenizer.decode(tokens.prefix(length))
        assert decoded.shape == (2, 3, 16, 16) and decoded.abs().max() <= 1
    errors = []
    for k in range(1, tokenizer.planes + 1):
        part = tokenizer.first_scales(tokens, k)
        errors.append(float((tokenizer.decode(part) - to_float(pixels)).square().mean()))
        stopped = codec(
            variant, channels=3, final_threshold=tokenizer.config.final_threshold * 2 ** (tokenizer.planes - k)
        )
        assert torch.equal(stopped.encode(to_float(pixels)).lengths, part.lengths)
    assert errors[0] > 100 * errors[-1]
    # the coarsest planes already have color, as blocks of the three color planes are interleaved
    half = tokenizer.decode(tokens.prefix(int(tokens.lengths.min()) // 3))
    assert (half[:, 0] - half[:, 2]).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_constant_images(variant, level):
    pixels = torch.full((1, 1, 16, 16), level, dtype=torch.uint8)
    tokenizer = codec(variant)
    tokens = tokenizer.encode(to_float(pixels))
    assert (to_uint8(tokenizer.decode(tokens)).int() - level).abs().max() <= 2
    assert (tokens.header.item() == 0, tokens.lengths.item() == 0) == (level <= 1, level <= 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_bright_pixel_and_the_smallest_side(variant):
    pixels = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    pixels[0, 0, 3, 0] = 255
    tokenizer = codec(variant, side=4, final_threshold=2**-10)
    assert torch.equal(to_uint8(tokenizer.decode(tokenizer.encode(to_float(pixels)))), pixels)


def test_a_fixed_start_gives_every_image_all_planes():
    tokenizer = codec(start_threshold=4.0, wavelet="haar")
    tokens = tokenizer.encode(to_float(torch.cat([smooth(2), torch.zeros(1, 1, 16, 16, dtype=torch.uint8)])))
    assert tokens.header.flatten().tolist() == [7, 7, 7] == [tokenizer.planes] * 3
    assert tokens.lengths[2] == 7 * 16  # a black image has one token per block and plane
    own = codec(wavelet="haar").encode(to_float(smooth(2)))
    assert (own.lengths <= tokens.lengths[:2]).all()
    high = codec(start_threshold=2.0)
    with pytest.raises(ValueError, match=r"image 1 of the batch has a coefficient of .*use 4 or more, or 0 for"):
        high.encode(to_float(torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 16, 16)))


# -------------------------------------------------------------------------------------------------------- starts


def test_starts_are_drawn_from_what_was_measured():
    tokenizer = codec(channels=3, final_threshold=0.25)
    dark, light = smooth(40, 16, 3) // 8, 255 - smooth(40, 16, 3) // 8
    labels = torch.arange(2).repeat_interleave(40)
    pixels = to_float(torch.cat([dark, light]))
    tokenizer.fit([(pixels[:50], labels[:50]), (pixels[50:], labels[50:])])
    again = codec(channels=3, final_threshold=0.25)
    again.restore(tokenizer.statistics())
    own = tokenizer.encode(pixels).header[:, 0]
    for each in (tokenizer, again):
        prefix = each.start_prefix(torch.tensor([0] * 50 + [1] * 50 + [-1] * 50), range(150))
        assert set(prefix.header[:50, 0].tolist()) <= set(own[:40].tolist())
        assert set(prefix.header[50:100, 0].tolist()) <= set(own[40:].tolist())
        assert set(prefix.lengths.tolist()) <= {0, 4} and (prefix.lengths == 4).sum() > 100
        assert torch.equal(
            prefix.ids, tokenizer.start_prefix(torch.tensor([0] * 50 + [1] * 50 + [-1] * 50), range(150)).ids
        )
        positive = each.grammar.names.index("Positive")
        assert (prefix.ids[50:100, :, 0][prefix.lengths[50:100] == 4] == positive).float().mean() > 0.9
        each.decode(prefix)
    tokens = tokenizer.encode(pixels)
    bits = tokenizer.header_bits(tokens, labels)
    shares = (torch.bincount(own[:40], minlength=tokenizer.planes + 1) + 0.5) / (40 + 0.5 * (tokenizer.planes + 1))
    torch.testing.assert_close(bits[:40], -shares[own[:40]].double().log2())
    never = Tokens(tokens.ids[:1], tokens.lengths[:1], torch.zeros(1, 1).long())
    assert 5 < float(tokenizer.header_bits(never, labels[:1])) < 20


# ------------------------------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"side": 28}, "images.size: a side of 28 pixels; allowed: powers of two from 4, e.g. 16 or 32"),
        ({"side": 2}, "a side of 2 pixels"),
        ({"channels": 2}, "allowed: squares with 1 or 3 channels"),
        ({"wavelet": "db2"}, "tokenizer.wavelet='db2'; allowed: haar, bior4.4"),
        ({"variant": "trees"}, "tokenizer.variant='trees'; allowed: blocks, zerotree"),
        ({"final_threshold": 0.3}, "tokenizer.final_threshold=0.3; allowed: powers of two from 2\\^-20 to"),
        ({"final_threshold": 0.0}, "tokenizer.final_threshold=0.0"),
        ({"final_threshold": 64.0}, "tokenizer.final_threshold=64.0"),
        (
            {"final_threshold": 1.0, "start_threshold": 0.5},
            "start_threshold=0.5; allowed: tokenizer.final_threshold=1.0 or more",
        ),
    ],
)
def test_configs_that_cannot_be(named, message):
    with pytest.raises(ValueError, match=message):
        codec(**named)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\); allowed: \(1, 16, 16\)"):
        codec().encode(torch.zeros(1, 1, 8, 8))


def test_without_numba_it_is_the_same_only_slower():
    code = (
        "import sys, torch, warnings\n"
        "sys.modules['numba'] = None\n"
        "from stages.codecs.bitplane import BitplaneCodec, BitplaneConfig\n"
        "for variant in sys.argv[1:]:\n"
        "    with warnings.catch_warnings(record=True) as said:\n"
        "        warnings.simplefilter('always')\n"
        "        codec = BitplaneCodec(BitplaneConfig(variant=variant), (16, 16), 1)\n"
        "    assert any('octaves[codecs]' in str(one.message) for one in said), said\n"
        "    tokens = codec.encode(torch.linspace(-1, 1, 512).view(2, 1, 16, 16))\n"
        "    assert (codec.decode(tokens) - torch.linspace(-1, 1, 512).view(2, 1, 16, 16)).abs().max() < 0.2\n"
        "    codec.grammar.annotate(tokens)\n"
        "    print(tokens.ids.flatten().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *VARIANTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for variant, said in zip(VARIANTS, done.stdout.splitlines(), strict=True):
        tokens = codec(variant).encode(torch.linspace(-1, 1, 512).view(2, 1, 16, 16))
        assert said == str(tokens.ids.flatten().tolist())
