"""upsample and edit, as functions and as commands: what stays, what changes, and wrong input."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.views import to_float
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.edit import edit_pixels, open_elements
from pipeline.errors import RunError
from pipeline.models import load_models
from pipeline.requests import Request, parse_prompts
from pipeline.upsample import upsample_pixels
from stages.contract import PrefixUnsupported, Prompts
from stages.measures.upsampling import back_project, consistency, enlarge, reduce_to
from stages.prior.sampling import SamplingConfig

SETTINGS = SamplingConfig()


@pytest.fixture(scope="module")
def models(finished):
    return load_models(load_config(finished / "tiny.yaml", [f"run={finished}/run"]))


@pytest.fixture(scope="module")
def pixels(image_folder):
    files = sorted(image_folder.rglob("*.png"))[:4]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


def nothing(count):
    return Prompts.of_labels(torch.full((count,), -1))


def octaves(finished, command, tmp_path, *items):
    return main([command, str(finished / "tiny.yaml"), f"run={finished}/run", f"out={tmp_path}/out", *items])


def test_upsampling_keeps_the_small_images_tokens(models, pixels):
    small = reduce_to(pixels, 8)
    prefix = models.encode(small)
    drawn = models.draw(nothing(4), SETTINGS, range(4), prefix=prefix)
    assert prefix.ids.shape[1] == 8 and torch.equal(drawn.ids[:, :8], prefix.ids)
    made = upsample_pixels(models, small, nothing(4), SETTINGS, range(4), exact=0, detail=1)
    assert made.shape == (4, 3, 16, 16) and torch.equal(made, models.decode(drawn))
    exact = upsample_pixels(models, small, nothing(4), SETTINGS, range(4), detail=1)
    assert consistency(exact, small) > 45 > consistency(made, small)
    half = upsample_pixels(models, small, nothing(4), SETTINGS, range(4), detail=0.5)
    assert (half.float() - (exact.float() + enlarge(small, 16).float()) / 2).abs().max() <= 0.5
    assert torch.equal(upsample_pixels(models, small, nothing(4), SETTINGS, range(4), detail=0), enlarge(small, 16))
    # a scale-causal decoder: the small image as the tokenizer sees it, whatever was drawn after it
    with torch.inference_mode():
        seen = models.tokenizer.decode(prefix)
    averaged = torch.nn.functional.avg_pool2d(models.tokenizer.decode(drawn), 2)
    assert (averaged - seen).abs().max() < 0.3 and averaged.shape == seen.shape


@pytest.mark.parametrize(("side", "to", "result"), [(4, 8, 8), (4, 0, 16), (8, 16, 16)])
def test_any_rung_to_any_rung(models, pixels, side, to, result):
    made = upsample_pixels(models, reduce_to(pixels, side), nothing(4), SETTINGS, range(4), to)
    assert made.shape[-1] == result


@pytest.mark.parametrize(
    ("side", "to", "message"),
    [
        (2, 0, "the image has 2 px; allowed: 4, 8, 16"),
        (8, 12, "to= has 12 px; allowed: 4, 8, 16"),
        (16, 0, "the result would not be larger"),
        (8, 8, "the result would not be larger"),
    ],
)
def test_a_side_that_is_no_rung_is_named(models, pixels, side, to, message):
    with pytest.raises(RunError, match=message):
        upsample_pixels(models, reduce_to(pixels, side), nothing(4), SETTINGS, range(4), to)


def test_the_prompt_matters(models, pixels):
    small = reduce_to(pixels, 8)
    settings = SamplingConfig(guidance=50.0)
    one, other = (
        models.draw(Prompts.of_labels(torch.full((4,), label)), settings, range(4), prefix=models.encode(small))
        for label in (0, 2)
    )
    assert not torch.equal(one.ids, other.ids)


def test_editing_keeps_the_frozen_scales(models, pixels):
    tokens = models.encode(pixels)
    for frozen in (1, 2):
        length = 4 * frozen
        made = edit_pixels(models, pixels, frozen, nothing(4), SETTINGS, range(4))
        drawn = models.draw(nothing(4), SETTINGS, range(4), prefix=tokens.prefix(length))
        assert torch.equal(made, models.decode(drawn)) and torch.equal(drawn.ids[:, :length], tokens.ids[:, :length])


def test_a_mask_opens_the_elements_that_it_touches(models):
    layout = models.tokenizer.layout
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[0, 15] = True  # one pixel, in the upper right of a grid of 2x2
    assert open_elements(layout, mask).view(3, 4).tolist() == [[False, True, False, False]] * 3
    assert open_elements(layout, mask | True).all() and not open_elements(layout, mask & False).any()


def test_a_masked_edit_changes_only_what_the_mask_touches(models, pixels):
    known = models.encode(pixels)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    made = edit_pixels(models, pixels, 1, nothing(4), SETTINGS, range(4), mask)
    assert torch.equal(made, models.decode(known))  # nothing is open: the tokenizer's own reconstruction
    mask[:8, 8:] = True
    keep = ~open_elements(models.tokenizer.layout, mask)
    keep[:4] = True
    drawn = models.draw(nothing(4), SETTINGS, range(4), prefix=known.prefix(4), known=known, keep=keep.expand(4, -1))
    assert torch.equal(drawn.ids[:, keep], known.ids[:, keep]) and not torch.equal(drawn.ids, known.ids)
    assert torch.equal(edit_pixels(models, pixels, 1, nothing(4), SETTINGS, range(4), mask), models.decode(drawn))


def test_wrong_edits_are_named(models, pixels):
    for frozen, message in (
        (3, "frozen=3; allowed: 1 to 2 of the 3 scales"),
        (0, r"allowed: 1 to 2.*\(0 with a mask\)"),
    ):
        with pytest.raises(RunError, match=message):
            edit_pixels(models, pixels, frozen, nothing(4), SETTINGS, range(4))
    with pytest.raises(RunError, match="images of 8x8, but this tokenizer takes 16x16; set images.size"):
        edit_pixels(models, reduce_to(pixels, 8), 1, nothing(4), SETTINGS, range(4))
    with pytest.raises(RunError, match=r"a mask of \(8, 8\) for images of \(16, 16\)"):
        edit_pixels(models, pixels, 1, nothing(4), SETTINGS, range(4), torch.ones(8, 8, dtype=torch.bool))


def test_a_dense_encoder_can_do_neither(models, pixels, monkeypatch):
    monkeypatch.setattr(
        models.tokenizer, "layout", dataclasses.replace(models.tokenizer.layout, encodes_prefixes=False)
    )
    with pytest.raises(PrefixUnsupported, match="sit-sce or sit-sc"):
        upsample_pixels(models, reduce_to(pixels, 8), nothing(4), SETTINGS, range(4))
    with pytest.raises(PrefixUnsupported, match="sit-sce or sit-sc"):
        edit_pixels(models, pixels, 1, nothing(4), SETTINGS, range(4))


def test_a_tokenizer_of_one_scale_is_told_apart_from_a_wrong_side(models, pixels, monkeypatch):
    layout = models.tokenizer.layout
    raster = dataclasses.replace(layout, scales=layout.scales[-1:], encodes_prefixes=False, decodes_prefixes=False)
    monkeypatch.setattr(models.tokenizer, "layout", raster)
    with pytest.raises(PrefixUnsupported, match="upsampling needs a scale-causal encoder.*sit-sce or sit-sc"):
        upsample_pixels(models, reduce_to(pixels, 8), nothing(4), SETTINGS, range(4))


def test_a_dense_decoder_stops_at_the_full_size_only(models, pixels, monkeypatch):
    dense = dataclasses.replace(models.tokenizer.layout, decodes_prefixes=False)
    monkeypatch.setattr(models.tokenizer, "layout", dense)
    with pytest.raises(PrefixUnsupported, match="to=8: this tokenizer's decoder needs all scales; leave to= out"):
        upsample_pixels(models, reduce_to(pixels, 4), nothing(4), SETTINGS, range(4), to=8)
    assert upsample_pixels(models, reduce_to(pixels, 4), nothing(4), SETTINGS, range(4), to=16).shape[-1] == 16


def test_bicubic_and_averaging_against_known_values():
    flat = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(enlarge(flat, 16), torch.full((1, 3, 16, 16), 77, dtype=torch.uint8))
    steps = torch.tensor([[[[0, 2], [4, 6]]]], dtype=torch.uint8)
    assert reduce_to(steps, 1).item() == 3
    assert torch.equal(to_float(reduce_to(steps.repeat_interleave(4, 2).repeat_interleave(4, 3), 2)), to_float(steps))
    with pytest.raises(ValueError, match="cannot be averaged"):
        reduce_to(flat, 3)


def test_back_projection_keeps_detail_and_puts_the_small_image_back(pixels):
    small = reduce_to(pixels, 8)
    shifted = (pixels.float() * 0.8 + 20).round().to(torch.uint8)
    before, after = (consistency(made, small) for made in (shifted, back_project(shifted, small, 3)))
    assert after > before + 20
    assert torch.equal(back_project(shifted, small, 0), shifted)
    # what already reduces to the small image stays as it is
    blocks = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(back_project(blocks, small, 3), blocks)


def test_prompts_of_a_request(models):
    names = [prompt.name for prompt in parse_prompts(Request(), models.prior)]
    assert names == ["blue", "green", "red"]
    assert [prompt.label for prompt in parse_prompts(Request(), models.prior, every_class=False)] == [-1]
    assert parse_prompts(Request(classes="red"), models.prior, every_class=False)[0].label == 2
    with pytest.raises(RunError, match="trained without captions"):
        parse_prompts(Request(text="a flower"), models.prior)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


def test_the_upsample_command(finished, tmp_path, pixels, capsys):
    for index, small in enumerate(reduce_to(pixels, 8)):
        save(tmp_path / f"in/{index}.png", small)
    assert octaves(finished, "upsample", tmp_path, f"input={tmp_path}/in", "count=2", "classes=red", "seed=5") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[:2] == ["0-red-000005.png", "0-red-000006.png"] and names[-1] == "sheet.png" and len(names) == 9
    assert Image.open(tmp_path / "out/3-red-000012.png").size == (16, 16)
    assert capsys.readouterr().out.count("match the input with") == 4
    assert octaves(finished, "upsample", tmp_path, f"input={tmp_path}/in/0.png", "count=1", "to=16", "seed=5") == 0


def test_the_edit_command(finished, tmp_path, pixels):
    image = save(tmp_path / "face.png", pixels[0])
    keys = [f"input={image}", "count=2", "classes=green"]
    assert octaves(finished, "edit", tmp_path, *keys, "frozen=1,2", "guidances=1,3") == 0
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(names) == 9 and "face-frozen2-guidance3-green-000001.png" in names and "face-sheet.png" in names
    white = Image.new("L", (16, 16), 255)
    white.save(tmp_path / "mask.png")
    assert octaves(finished, "edit", tmp_path, *keys, f"mask={tmp_path}/mask.png", "frozen=0") == 0


@pytest.mark.parametrize("command", ["upsample", "edit"])
def test_inputs_whose_results_would_share_a_name_are_refused_before_any_work(
    finished, tmp_path, pixels, capsys, command
):
    for name in ("a.bmp", "b.png", "a.png"):
        save(tmp_path / "in" / name, reduce_to(pixels, 8)[0])
    assert octaves(finished, command, tmp_path, f"input={tmp_path}/in") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "contains a.bmp and a.png, whose results would have the same name" in error[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "items", "message"),
    [
        ("upsample", [], "input= is missing"),
        ("upsample", ["input=/nowhere.png"], "no such image or folder"),
        ("upsample", ["input={small}", "to=7"], "to= has 7 px; allowed: 4, 8, 16"),
        ("upsample", ["input={small}", "to=large"], "large"),
        ("upsample", ["input={wide}"], "needs square images"),
        ("upsample", ["input={text}"], "notes.png"),
        ("upsample", ["input={small}", "text=a flower"], "trained without captions"),
        ("upsample", ["input={small}", "count=0"], "count=0"),
        ("upsample", ["input={small}", "exact=-1"], "exact=-1; allowed: 0 or more"),
        ("upsample", ["input={small}", "detail=2"], "detail=2; allowed: 0 to 1"),
        ("upsample", ["input={small}", "detail=much"], "detail=much; allowed: a number"),
        ("edit", ["input={small}", "frozen=5"], "frozen=5; allowed: 1 to 2"),
        ("edit", ["input={small}", "frozen=two"], "frozen=two; allowed: comma-separated numbers"),
        ("edit", ["input={small}", "mask={wide}"], "make them equal"),
        ("edit", ["input={small}", "mask=/nowhere.png"], "no such image"),
        ("edit", ["input={small}", "mask={black}"], "has no white inside the crop"),
        ("edit", ["input={small}", "images.size=8"], "images of 8x8, but this tokenizer takes 16x16"),
        ("upsample", ["input={small}", "images.channels=1"], "images.channels=1, but this tokenizer takes 3"),
        ("upsample", ["input={small}", "classes=²"], "classes=²; allowed: 0 to 2"),
        ("edit", ["input={small}", "guidances=nan"], "guidance"),
    ],
)
def test_wrong_input_is_one_line(finished, tmp_path, pixels, capsys, command, items, message):
    save(tmp_path / "small.png", reduce_to(pixels, 8)[0])
    save(tmp_path / "wide.png", pixels[0, :, :8])
    (tmp_path / "notes.png").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    files = {"small": "small", "wide": "wide", "text": "notes", "black": "black"}
    names = {name: tmp_path / f"{file}.png" for name, file in files.items()}
    assert octaves(finished, command, tmp_path, *(item.format(**names) for item in items)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("octaves: ") and message in error[-1]
