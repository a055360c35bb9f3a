"""SIT with luma and chroma apart, through all commands: prefixes, the ladder, and colouring."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.colorize as colorize
from data.images.views import to_uint8
from pipeline.colorize import colorize_pixels, elements_of, luma_scales
from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.models import load_models
from stages.prior.sampling import SamplingConfig
from stages.spectral.colour import luma_of
from stages.weights import load_tokenizer
from tests.pipeline.runs import caller, train_all, write_tiny

PLANES = ("tokenizer.planes=ycbcr", "tokenizer.transform=bior2.2", "tokenizer.scales=2", "tokenizer.overlap=1")


def made_with(folder, *more):
    return caller(folder, *PLANES, *more)


@pytest.fixture(scope="module")
def planes(tmp_path_factory, image_folder):
    """A finished run and its YAML."""
    folder = tmp_path_factory.mktemp("planes")
    write_tiny(folder, image_folder)
    train_all(made_with(folder))
    return folder


@pytest.fixture
def models(planes):
    return load_models(load_config(planes / "tiny.yaml", [f"run={planes}/run", *PLANES]))


def test_evaluation_climbs_rungs_that_have_luma_and_chroma(planes):
    assert made_with(planes)("eval", "eval.upsample_from=8", "eval.edit_frozen=[2]") == 0
    metrics = json.loads((planes / "run/eval/default/metrics.json").read_text())
    assert [rung["num_scales"] for rung in metrics["ladder"]["rungs"]] == [2, 4]
    assert metrics["ladder"]["agreement"]["positions"] == 8 * 20
    assert metrics["ladder"]["agreement"]["agreeing_share"] > 0.99
    assert [prefix["num_scales"] for prefix in metrics["tokenizer"]["prefixes"]] == [1, 2, 3, 4]
    assert metrics["upsampling"]["from"] == 8 and metrics["editing"]["frozen"][0]["image_size"] == [8, 8]


def test_the_other_commands_take_it(planes, image_folder, tmp_path):
    call = made_with(planes)
    assert call("sample", "count=2", f"out={tmp_path}/out", "sampling.scales=1") == 0  # luma alone: a gray image
    for path in (tmp_path / "out").glob("*-*.png"):
        picture = np.array(Image.open(path)).astype(int)
        assert picture.shape == (8, 8, 3) and np.ptp(picture, axis=-1).max() <= 1
    Image.open(image_folder / "red/003.png").resize((8, 8), Image.Resampling.BOX).save(tmp_path / "small.png")
    assert call("upsample", f"input={tmp_path}/small.png", f"out={tmp_path}/up", "count=1") == 0
    assert Image.open(next((tmp_path / "up").glob("small-*.png"))).size == (16, 16)
    assert call("edit", f"input={image_folder}/red/003.png", "frozen=3", f"out={tmp_path}/edit", "count=1") == 0
    assert call("export", f"out={tmp_path}/export") == 0
    assert load_tokenizer(planes / "run/tokenizer/tokenizer.safetensors")[0].config.planes == "ycbcr"


def test_colouring_keeps_luma_and_draws_chroma(models, monkeypatch):
    """Known luma in natural order: what the engine does for any order of a fixed layout."""
    monkeypatch.setattr(colorize, "check_colouring", lambda models: None)
    drawn, draw = [], type(models).draw
    monkeypatch.setattr(type(models), "draw", lambda self, *a, **k: drawn.append(draw(self, *a, **k)) or drawn[-1])
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gray = luma_of(to_uint8(pixels)).expand(3, -1, -1, -1)
    prompts = models.prompts([0, 1, -1], ["", "", ""])
    made = colorize_pixels(models, gray, prompts, SamplingConfig(), [5, 6, 7])
    layout = models.tokenizer.layout
    luma = elements_of(layout, luma_scales(layout))
    assert luma.sum() == 32 and len(luma) == 40
    given = models.encode(gray.expand(-1, 3, -1, -1)).ids
    assert torch.equal(drawn[0].ids[:, luma], given[:, luma])
    assert not torch.equal(drawn[0].ids[0, ~luma], drawn[0].ids[1, ~luma])
    inside = ((made > 0) & (made < 255)).all(1, keepdim=True)  # elsewhere the colour was cut off
    assert inside.any() and (luma_of(made).int() - gray.int())[inside].abs().max() <= 1
    again = colorize_pixels(models, gray[1:2], prompts[1:2], SamplingConfig(), [6])
    assert torch.equal(again[0], made[1])


def test_what_cannot_be_coloured_is_named(planes, gray, models, capsys):
    with pytest.raises(RunError, match=r"writes luma first, this one has prior.order=natural"):
        colorize_pixels(
            models, torch.zeros(1, 1, 16, 16, dtype=torch.uint8), models.prompts([0], [""]), SamplingConfig(), [0]
        )
    for command, items, message in (
        ("colorize", (f"input={gray}",), "prior.order=natural; train one with prior.order=luma_first"),
        ("eval", ("eval.num_colorized=2",), "with prior.order=natural: colorization"),
        ("sample", ("images.channels=1",), "tokenizer.planes=ycbcr with images.channels=1"),
        ("sample", ("tokenizer.overlap=3",), "tokenizer.overlap=3; allowed: 0 to tokenizer.patch=2"),
        ("sample", ("tokenizer.planes=yuv",), "tokenizer.planes='yuv'; allowed: all, ycbcr"),
        ("sample", ("tokenizer.transform=bior9.9",), "tokenizer.transform='bior9.9'; allowed: identity, haar, bior2.2"),
    ):
        assert made_with(planes)(command, *items) == 2
        assert message in capsys.readouterr().err


def test_colouring_from_end_to_end(planes, gray, tmp_path):
    call = made_with(planes, f"prior.path={planes}/luma/prior.safetensors", "prior.order=luma_first")
    assert call("train-prior") == 0
    out = tmp_path / "out"
    assert call("colorize", f"input={gray}", "count=2", f"out={out}", "seed=5") == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0-000005.png", "0-000006.png", "1-000007.png", "1-000008.png", "sheet.png"]
    for name in names[:-1]:
        given = np.array(Image.open(gray / f"{name[0]}.png")).astype(int)
        picture = np.array(Image.open(out / name))
        inside = ((picture > 0) & (picture < 255)).all(-1)
        assert (
            inside.any() and abs(np.array(Image.open(out / name).convert("L")).astype(int) - given)[inside].max() <= 2
        )
    assert (np.array(Image.open(out / names[0])) != np.array(Image.open(out / names[1]))).any()
    assert call("eval", "eval.num_colorized=6", "eval.name=colour") == 0
    rows = json.loads((planes / "run/eval/colour/metrics.json").read_text())["colouring"]["rows"]
    assert rows["original"]["chroma_error"] == 0 and rows["gray"]["saturation"] < 1 < rows["coloured"]["saturation"]
    assert set(rows) == {"coloured", "gray", "mean_chroma", "bound", "original"}
