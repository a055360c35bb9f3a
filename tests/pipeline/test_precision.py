"""A run, a cache and a prior go on in the precision that they began with, on any machine; all of them say which."""

import json
import shutil

import pytest
import torch

from data.tokens.manifest import Manifest
from pipeline.__main__ import main
from pipeline.run import is_made
from stages import precision
from stages.weights import read_metadata, read_weights
from tests.conftest import TINY

STAGES = ("train-tokenizer", "cache-tokens", "train-prior")


@pytest.fixture
def machine(monkeypatch):
    """This machine, as one that multiplies bf16 or one that emulates it."""

    def play(kind):
        monkeypatch.setattr(precision, "_fastest", lambda device: kind)

    return play


@pytest.fixture
def auto(tmp_path, image_folder):
    """A YAML that leaves precision to the machine."""
    path = tmp_path / "auto.yaml"
    path.write_text(TINY.format(path=image_folder).replace('  precision: "32"\n', ""))
    return str(path)


def weights_of(folder):
    return [read_weights(folder / place)[1] for place in ("tokenizer/tokenizer.safetensors", "prior/prior.safetensors")]


def test_what_was_resolved_is_stored_everywhere(auto, tmp_path, machine):
    machine("bf16")
    run = tmp_path / "run"
    for command in (*STAGES, "eval"):
        assert main([command, auto, f"run={run}"]) == 0
    for stage, section in (("tokenizer", "tokenizer_training"), ("prior", "prior_training")):
        assert read_metadata(run / stage / f"{stage}.safetensors")["precision"] == "bf16"
        newest = max((run / stage / "checkpoints").glob("*.ckpt"))
        assert torch.load(newest, weights_only=True)["precision"] == "bf16"
        assert f"{section}:" in (run / stage / "config.yaml").read_text()
        assert "precision: bf16" in (run / stage / "config.yaml").read_text()
    assert Manifest.load(run / "tokens").precision == "bf16"
    settings = json.loads((run / "eval" / "default" / "metrics.json").read_text())["settings"]
    assert settings["precisions"] == {"eval": "bf16", "sampling": "bf16"}
    assert "classifier's training bfloat16" in settings["precision"]


@pytest.mark.parametrize(("began", "here"), [("bf16", "32"), ("32", "bf16")])
def test_a_run_goes_on_in_its_own_precision_on_another_machine(auto, tmp_path, machine, capsys, began, here):
    machine(began)
    for name in ("whole", "moved"):
        for command in STAGES:
            assert main([command, auto, f"run={tmp_path / name}"]) == 0
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    # half of each stage is lost, and the rest is made on another machine
    for stage in ("tokenizer", "prior"):
        (moved / stage / f"{stage}.safetensors").unlink()
        max((moved / stage / "checkpoints").glob("*.ckpt")).unlink()
    (moved / "tokens" / "manifest.json").unlink()
    (moved / "tokens" / "val" / "000000.tar").unlink()
    machine(here)
    capsys.readouterr()
    for command in STAGES:
        assert main([command, auto, f"run={moved}"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"in precision {began}") == 2
    assert said.count("precision=bf16: bf16 is emulated on this cpu") == (3 if began == "bf16" else 0)
    for expected, found in zip(weights_of(whole), weights_of(moved), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for path in ("train/000000.tar", "val/000000.tar", "manifest.json"):
        assert (moved / "tokens" / path).read_bytes() == (whole / "tokens" / path).read_bytes()


def test_a_folder_from_before_auto_goes_on_in_what_it_wrote_down(finished, auto, tmp_path, machine, capsys):
    shutil.copytree(finished / "run", tmp_path / "old")
    old = tmp_path / "old"
    for stage in ("tokenizer", "prior"):
        (old / stage / f"{stage}.safetensors").unlink()
        for path in (old / stage / "checkpoints").glob("*.ckpt"):
            checkpoint = torch.load(path, weights_only=True)
            del checkpoint["precision"]
            torch.save(checkpoint, path)
    text = (old / "prior" / "config.yaml").read_text()
    (old / "prior" / "config.yaml").write_text(text.replace("tokens:\n", "tokens:\n  precision: '32'\n"))
    machine("bf16")
    for command in STAGES:
        assert main([command, auto, f"run={old}"]) == 0
    for expected, found in zip(weights_of(finished / "run"), weights_of(old), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_precision_than_the_folder_s_is_refused(finished, auto, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    place = f"run={tmp_path / 'run'}"
    for command, key in zip(STAGES, ("tokenizer_training", "tokens", "prior_training"), strict=True):
        assert main([command, auto, place, f"{key}.precision=bf16"]) == 2
        assert f"{key}.precision: 32, now bf16" in capsys.readouterr().err


def test_a_checkpoint_of_another_precision_is_refused(auto, tmp_path, machine, capsys):
    for name in ("32", "bf16"):
        machine(name)
        assert main(["train-tokenizer", auto, f"run={tmp_path / name}"]) == 0
    (tmp_path / "bf16" / "tokenizer" / "tokenizer.safetensors").unlink()
    for path in (tmp_path / "32" / "tokenizer" / "checkpoints").glob("*.ckpt"):
        shutil.copy(path, tmp_path / "bf16" / "tokenizer" / "checkpoints" / path.name)
    assert main(["train-tokenizer", auto, f"run={tmp_path / 'bf16'}"]) == 2
    assert "the checkpoint is of a training in precision 32, this one is in bf16" in capsys.readouterr().err


def test_a_device_without_the_precision_of_a_run_does_not_go_on_with_it(auto, tmp_path, machine, monkeypatch, capsys):
    machine("bf16")
    place = f"run={tmp_path / 'run'}"
    assert main(["train-tokenizer", auto, place]) == 0
    monkeypatch.setattr(precision, "_has_no_bf16", lambda kind: True)
    assert main(["train-tokenizer", auto, place]) == 2
    assert "began in precision bf16, which this cpu device does not have" in capsys.readouterr().err
    assert main(["cache-tokens", auto, place, "tokens.precision=bf16"]) == 2
    assert "precision=bf16: this cpu device has no bfloat16; allowed: auto, 32" in capsys.readouterr().err


def test_a_folder_in_which_nothing_was_made_takes_what_suits_the_machine(auto, tmp_path, machine):
    run = tmp_path / "run"
    machine("bf16")
    assert main(["train-tokenizer", auto, f"run={run}", "images.path=/nowhere"]) == 2
    assert not is_made(run / "tokenizer")
    machine("32")
    assert main(["train-tokenizer", auto, f"run={run}"]) == 0
    assert read_metadata(run / "tokenizer" / "tokenizer.safetensors")["precision"] == "32"


@pytest.mark.parametrize("key", ["tokenizer_training", "tokens", "prior_training", "sampling", "eval"])
def test_an_unknown_precision_is_one_line(auto, key, capsys):
    assert main(["eval", auto, f"{key}.precision=fp8"]) == 2
    assert f"{key}.precision='fp8'; allowed: auto, 32, bf16" in capsys.readouterr().err
