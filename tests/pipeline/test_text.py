"""Captions through all commands: words and a class, by cross-attention, from files beside the images."""

import json
import shutil

import pytest
import torch
from PIL import Image

from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.models import load_models
from stages.conditions.encoders import WordEncoder
from tests.conftest import TINY


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, image_folder):
    """A finished run on images with captions, in ``run`` beside its ``tiny.yaml``."""
    folder = tmp_path_factory.mktemp("captioned")
    shutil.copytree(image_folder, folder / "images")
    for index, image in enumerate(sorted((folder / "images").rglob("*.png"))):
        if index % 10:  # some have none
            image.with_suffix(".txt").write_text(f"a {image.parent.name} picture, number {index % 7}")
    text = TINY.format(path=folder / "images") + "tokens: {text_encoder: words, max_caption_tokens: 6}\n"
    (folder / "tiny.yaml").write_text(text + "condition: {kind: class-text, attend: cross}\n")
    for command in ("train-tokenizer", "cache-tokens", "train-prior", "eval"):
        assert octaves(folder, command) == 0, command
    return folder


def octaves(folder, command, *items):
    return main([command, str(folder / "tiny.yaml"), f"run={folder}/run", *items])


def test_the_prior_knows_its_words_without_the_cache(captioned, tmp_path):
    shutil.copytree(captioned, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/run/tokens")
    keys = ["text=a red picture | something else", "classes=red", "count=2", f"out={tmp_path}/out"]
    assert octaves(tmp_path / "copy", "sample", *keys) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "a_red_picture__red-000000.png",
        "a_red_picture__red-000001.png",
        "grid.png",
        "something_else__red-000002.png",
        "something_else__red-000003.png",
    ]


def test_evaluation_asks_by_held_out_captions(captioned):
    metrics = json.loads((captioned / "run/eval/default/metrics.json").read_text())
    assert metrics["samples"]["prompts"] == "classes and captions of held-out images"
    assert metrics["samples"]["class_accuracy"]["count"] == 8
    assert (captioned / "run/eval/default/samples.png").exists()


def test_a_text_changes_what_is_drawn_and_no_text_is_allowed(captioned):
    config = load_config(captioned / "tiny.yaml", [f"run={captioned}/run", "sampling.guidance=6"])
    models = load_models(config)
    with torch.no_grad():
        for parameter in models.prior.condition.parameters():
            parameter.mul_(20)  # a prior of six steps hardly listens
    drawn = [
        models.draw(models.prompts([-1] * 4, texts), config.sampling, range(4)).ids
        for texts in (["a red picture"] * 4, ["number 3 blue"] * 4, [""] * 4, ["a red picture", "", "", ""])
    ]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[3][0], drawn[0][0]) and torch.equal(drawn[3][1:], drawn[2][1:])
    assert isinstance(models.text_encoder, WordEncoder)


@pytest.mark.parametrize(
    "text", ["a " * 5000, "красный цвет", "赤い写真", "🙂🍏", "a, b", "no", "[1", "???", "${x}", "a=b"]
)
def test_any_text_is_taken_as_it_is(captioned, tmp_path, text):
    assert octaves(captioned, "sample", f"text={text}", "count=1", f"out={tmp_path}") == 0
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert Image.open(tmp_path / "grid.png").width < 600


@pytest.mark.parametrize(
    ("command", "items", "message"),
    [
        ("sample", ["text= "], "text= contains an empty caption"),
        ("sample", ["text=red |"], "text= contains an empty caption"),
        ("sample", ["text=red", "classes=purple"], "classes=purple; allowed: 0 to 2"),
        (
            "train-prior",
            ["condition.attend=both", "run={fresh}", "tokens.path={run}/tokens"],
            "condition.attend='both'",
        ),
        ("cache-tokens", ["tokens.max_caption_tokens=7"], "was made with another config (tokens.max_caption_tokens"),
        ("cache-tokens", ["tokens.max_caption_tokens=0"], "tokens.max_caption_tokens=0; allowed: 1 or more"),
        ("cache-tokens", ["tokens.text_encoder=/nowhere", "tokens.path={fresh}"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line(captioned, tmp_path, capsys, command, items, message):
    places = {"run": captioned / "run", "fresh": tmp_path / "fresh"}
    assert octaves(captioned, command, *(item.format(**places) for item in items)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("octaves: ") and message in error[-1]


def test_a_prior_with_text_needs_a_cache_with_text(finished, tmp_path, capsys):
    keys = ["tokens.text_encoder=words", "condition.kind=text", f"tokens.path={finished}/run/tokens"]
    assert main(["train-prior", str(finished / "tiny.yaml"), f"run={tmp_path}/run", *keys]) == 2
    assert "the token cache has no caption states" in capsys.readouterr().err
