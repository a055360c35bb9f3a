"""The studio's actions as functions, from the values of controls to pictures."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from pipeline.config import load_run
from pipeline.edit import edit_pixels
from pipeline.errors import RunError
from pipeline.studio_actions import (
    Wish,
    check_upload,
    draw_samples,
    edit_upload,
    mask_pixels,
    read_wish,
    reduce_by_averaging,
    upsample_upload,
)
from pipeline.studio_looks import data_uri, pictures
from stages.measures.upsampling import reduce_to
from stages.prior.sampling import SamplingConfig
from tests.pipeline.studio_pictures import GREEN, array, pixels_of, sampled, silent


def test_a_draw_equals_the_sample_command_at_every_number_of_scales(studio, finished, tmp_path):
    done = []
    drawn = draw_samples(studio, Wish(GREEN, count=3, seed=5, guidance=2.0, temperature=0.5), done.append)
    assert done[-1] == 1 and done == sorted(done)
    settings = ["classes=green", "count=3", "seed=5", "sampling.guidance=2.0", "sampling.temperature=[0.5]"]
    for step, (number, _) in enumerate(drawn.steps):
        written = sampled(finished, tmp_path / str(number), *settings, f"sampling.scales={number}")
        shown = {f"{picture.name}.png": array(picture.pixels) for picture in drawn.shown(step)}
        assert shown.keys() == written.keys() == {f"green-00000{seed}.png" for seed in (5, 6, 7)}
        assert all(np.array_equal(shown[name], written[name]) for name in written)
    assert [number for number, _ in drawn.steps] == [1, 2, 3]


def test_upsampling_shows_input_bicubic_upload_and_candidates(studio, uploads):
    shown, about = upsample_upload(studio, str(uploads / "full.png"), 4, 8, Wish(count=2), silent)
    assert [picture.caption for picture in shown] == [
        "input, 4 px",
        "bicubic",
        "the upload at 8 px",
        "seed 0",
        "seed 1",
    ]
    assert [picture.pixels.shape[-1] for picture in shown] == [4, 8, 8, 8, 8] and " dB" in about
    shown, _ = upsample_upload(studio, str(uploads / "small.png"), 8, 16, Wish(count=1), silent)
    assert np.array_equal(array(shown[0].pixels), np.array(Image.open(uploads / "small.png")))
    assert shown[-1].pixels.shape[-1] == 16


def test_reducing_by_averaging_is_the_measures_own_where_sides_divide():
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal(reduce_by_averaging(pixels, 4), reduce_to(pixels.unsqueeze(0), 4)[0])
    assert reduce_by_averaging(pixels, 5).shape == (3, 5, 5)


def test_an_edit_is_the_edit_commands_own_under_what_was_painted(studio, uploads):
    path = str(uploads / "full.png")
    shown = edit_upload(studio, path, 1, "1000", Wish(GREEN, count=2), silent)
    assert [picture.caption for picture in shown] == ["original", "decoded", "seed 0", "seed 1"]
    original, prompts = shown[0].pixels, studio.models.prompts([GREEN] * 2, [""] * 2)
    assert np.array_equal(array(original), np.array(Image.open(path)))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8, :8] = True
    many = original.expand(2, -1, -1, -1)
    expected = edit_pixels(studio.models, many, 1, prompts, SamplingConfig(), [0, 1], mask)
    assert torch.equal(torch.stack([picture.pixels for picture in shown[2:]]), expected)
    with pytest.raises(RunError, match="frozen=0; allowed: 1 to 2"):
        edit_upload(studio, path, 0, "0000", Wish(GREEN), silent)


def test_a_painted_mask_covers_its_cells():
    mask = mask_pixels("0100", 2, 16)
    assert mask.shape == (16, 16) and mask[:8, 8:].all() and mask.sum() == 64
    assert mask_pixels("", 2, 16) is None and mask_pixels("0000", 2, 16) is None
    for wrong in ("01", "01000", "01a0"):
        with pytest.raises(RunError, match="allowed: 4 times 0 or 1"):
            mask_pixels(wrong, 2, 16)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(count=17), "images=17; allowed: 1 to 16"),
        (Wish(count=0), "images=0"),
        (Wish(guidance=math.nan), "guidance=nan; allowed: 0 to 20"),
        (Wish(guidance=-1.0), "guidance=-1.0"),
        (Wish(temperature=-0.5), "temperature=-0.5; allowed: 0 to 5"),
        (Wish(seed=-1), "seed=-1"),
        (Wish(seed=2**31), "seed=2147483648"),
        (Wish(label=3), "class 3; allowed: -1 (none) to 2"),
        (Wish(text="a"), "trained without captions"),
        (Wish(text="a" * 10_001), "a caption of 10001 characters; allowed: up to 10000"),
    ],
)
def test_wishes_out_of_range_are_refused(studio, wish, message):
    with pytest.raises(RunError, match=re.escape(message)):
        draw_samples(studio, wish, silent)


def test_values_of_a_page_are_numbers_or_refused():
    assert read_wish(1, None, 4.0, 1, 1, 7) == Wish(1, "", 4, 1.0, 1.0, 7)
    for values in ((1, "", None, 1, 1, 0), (1, "", 4, "x", 1, 0), (1, "", 4, 1, math.inf, 0), (1, "", 1.5, 1, 1, 0)):
        with pytest.raises(RunError):
            read_wish(*values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "cannot be read as an image"),
        ("long.png", "an image of 20000 x 10 pixels; allowed: 4096 per side"),
        (None, "upload one first"),
    ],
)
def test_uploads_are_judged_by_their_header(uploads, name, message, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("a refused upload was decoded"))
    with pytest.raises(RunError, match=re.escape(message)):
        check_upload(name and str(uploads / name))


def test_pictures_stand_in_the_page_with_their_own_pixels(studio):
    shown = draw_samples(studio, Wish(GREEN, count=1), silent).shown(2)[0]
    html = pictures([shown._replace(caption='<b>"seed"</b>')])
    assert "<b>" not in html and 'class="pixelated"' in html
    assert np.array_equal(pixels_of(re.search(r'src="([^"]+)"', html)[1]), array(shown.pixels))
    assert pixels_of(data_uri(torch.zeros(1, 4, 4, dtype=torch.uint8))).shape == (4, 4)


def test_a_runs_folder_opens_without_its_yaml(finished, tmp_path):
    config = load_run(str(finished / "run"), ["sampling.guidance=2.0"])
    assert (config.run, config.images.size, config.sampling.guidance) == (str(finished / "run"), 16, 2.0)
    assert config.tokenizer.path == f"{finished}/run/tokenizer/tokenizer.safetensors"
    with pytest.raises(RunError, match="is not a finished run"):
        load_run(str(tmp_path), [])
