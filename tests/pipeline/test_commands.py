"""The commands as a user calls them: all four stages, a toy tokenizer, wrong input."""

import json
import shutil

import pytest
from omegaconf import OmegaConf
from PIL import Image

from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.run import stage_folder
from stages import factory
from stages.weights import load_prior, load_tokenizer

TOKENIZER = "tokenizer.path={run}/tokenizer/tokenizer.safetensors"


def octaves(command, config, *overrides):
    return main([command, str(config), *overrides])


def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy/tiny.yaml", f"run={tmp_path}/copy/run", tmp_path / "copy/run"


def test_sample_writes_the_same_images_for_the_same_seed(finished, tmp_path):
    config, run, folder = copy(finished, tmp_path)
    assert octaves("sample", config, run, "count=2", "classes=red,0", f"out={tmp_path}/a") == 0
    assert octaves("sample", config, run, "count=2", "classes=red,0", f"out={tmp_path}/b", "eval.batch_size=3") == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["blue-000002.png", "blue-000003.png", "grid.png", "red-000000.png", "red-000001.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Image.open(tmp_path / "a/red-000000.png").size == (16, 16)


def test_sampling_fewer_scales_gives_smaller_images(finished, tmp_path):
    config, run, _ = copy(finished, tmp_path)
    assert octaves("sample", config, run, "count=1", "sampling.scales=2", f"out={tmp_path}/a") == 0
    assert Image.open(tmp_path / "a/red-000002.png").size == (8, 8)


def test_a_run_goes_on_when_a_key_is_younger_than_its_folders(finished, tmp_path, capsys):
    config, run, folder = copy(finished, tmp_path)
    for stage in ("tokenizer", "tokens", "prior"):
        path = folder / stage / "config.yaml"
        written = OmegaConf.load(path)
        for section, key in (("tokenizer_training", "r1_weight"), ("tokens", "text_encoder")):
            if section in written:
                del written[section][key]
        OmegaConf.save(written, path)
    for command in ("train-tokenizer", "cache-tokens", "train-prior"):
        assert octaves(command, config, run) == 0
    assert octaves("train-tokenizer", config, run, "tokenizer_training.r1_weight=1") == 2
    assert "was made with another config (tokenizer_training.r1_weight: 0.0, now 1.0)" in capsys.readouterr().err


def test_a_run_goes_on_with_the_defaults_that_it_began_with(finished, tmp_path, capsys, monkeypatch):
    """As if optimizer had come after the run, and its default had been muon once; and r1_weight's 2."""
    config, run, folder = copy(finished, tmp_path)
    earlier = {"tokenizer_training.optimizer": "muon", "tokenizer_training.r1_weight": 2.0}
    monkeypatch.setattr("pipeline.run.EARLIER_DEFAULTS", earlier)
    path = folder / "tokenizer/config.yaml"
    written = OmegaConf.load(path)
    del written.tokenizer_training["optimizer"]
    OmegaConf.save(written, path)
    loaded = load_config(config, [run])
    with stage_folder(folder / "tokenizer", loaded, "tokenizer") as begun:
        assert begun.tokenizer_training.optimizer == "muon"
        assert begun.tokenizer_training.r1_weight == loaded.tokenizer_training.r1_weight  # it began with what is now
    assert "continues with tokenizer_training.optimizer=muon, as before" in capsys.readouterr().out
    written.tokenizer_training.r1_weight = 2.0
    OmegaConf.save(written, path)
    with stage_folder(folder / "tokenizer", loaded, "tokenizer") as begun:
        assert begun.tokenizer_training.r1_weight == 2.0
    assert octaves("train-tokenizer", config, run, "tokenizer_training.r1_weight=1") == 2
    assert "(tokenizer_training.r1_weight: 2.0, now 1.0)" in capsys.readouterr().err
    with stage_folder(tmp_path / "new", loaded, "tokenizer") as begun:
        assert begun.tokenizer_training == loaded.tokenizer_training


def test_finished_stages_have_nothing_to_do(finished, tmp_path, capsys):
    config, run, folder = copy(finished, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for command in ("train-tokenizer", "cache-tokens", "train-prior"):
        assert octaves(command, config, run) == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("sample", ["classes=purple"], "classes=purple; allowed: 0 to 2, or blue, green, red"),
        ("sample", ["classes=3"], "classes=3; allowed: 0 to 2"),
        ("sample", ["count=0"], "count=0"),
        ("sample", ["sampling.scales=9"], "sampling.scales=9; allowed: 1 to 3"),
        ("sample", ["sampling.top_p=[2.0]"], "sampling.top_p"),
        ("train-prior", ["prior.width=30", "tokens.path={run}/tokens", "{fresh}"], "prior.width=30 is no multiple"),
        ("train-tokenizer", ["seed=5"], "was made with another config (seed: 0, now 5)"),
        ("train-tokenizer", ["images.size=18", "{fresh}"], "need a multiple of 8 (nearest: 16, 24)"),
        ("train-tokenizer", ["images.path=/nowhere", "{fresh}"], "/nowhere"),
        ("cache-tokens", ["{fresh}"], "train-tokenizer"),
        ("train-prior", ["{fresh}"], "cache-tokens"),
        ("eval", ["{fresh}"], "train-tokenizer"),
        ("bake", [], "no command 'bake'; allowed: train-tokenizer"),
        ("eval", ["eval.nam=x"], "nam"),
        ("eval", ["images.size=8"], "images of 8x8, but this tokenizer takes 16x16; set images.size to that"),
        ("eval", ["images.channels=1"], "images.channels=1, but this tokenizer takes 3; set images.channels to that"),
        ("cache-tokens", ["{fresh}", TOKENIZER, "images.size=8"], "images of 8x8, but this tokenizer takes 16x16"),
        ("cache-tokens", ["{fresh}", TOKENIZER, "images.channels=1"], "images.channels=1, but this tokenizer takes 3"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(finished, tmp_path, capsys, command, overrides, message):
    config, run, _ = copy(finished, tmp_path)
    if "{fresh}" in overrides:
        run = f"run={tmp_path}/fresh"
    overrides = [item.format(run=tmp_path / "copy/run") for item in overrides if item != "{fresh}"]
    assert octaves(command, config, run, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("octaves: ") and message in error


def test_parts_that_do_not_belong_together_are_refused(finished, tmp_path, capsys):
    config, run, folder = copy(finished, tmp_path)
    other = f"run={tmp_path}/other"
    assert octaves("train-tokenizer", config, other, "seed=7") == 0
    foreign = f"tokenizer.path={tmp_path}/other/tokenizer/tokenizer.safetensors"
    for command in ("sample", "eval", "cache-tokens"):
        assert octaves(command, config, run, foreign) == 2, command
    assert octaves("train-prior", config, f"run={tmp_path}/third", foreign, f"tokens.path={folder}/tokens") == 2
    assert "make cache-tokens" in capsys.readouterr().err


def test_two_runs_into_one_folder_are_refused(finished, tmp_path, capsys):
    import fcntl

    config, run, folder = copy(finished, tmp_path)
    with (folder / "tokenizer/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert octaves("train-tokenizer", config, run) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert octaves("train-tokenizer", config, run) == 0


def test_a_new_tokenizer_is_one_file_and_one_line(tmp_path, tiny, monkeypatch):
    """``mean_colour.py`` and this line in the factory go through all four commands."""
    line = ("tests.pipeline.mean_colour:MeanColourConfig", "tests.pipeline.mean_colour:MeanColour")
    monkeypatch.setitem(factory.TOKENIZERS, "mean-colour", line)
    text = tiny.read_text()
    start, end = text.index("tokenizer:"), text.index("tokenizer_training:")
    tiny.write_text(text[:start] + "tokenizer: {kind: mean-colour, steps: 8}\n" + text[end:])
    run = f"run={tmp_path}/run"
    for command in ("train-tokenizer", "cache-tokens", "train-prior", "eval", "sample"):
        assert octaves(command, tiny, run) == 0, command
    tokenizer, _ = load_tokenizer(tmp_path / "run/tokenizer/tokenizer.safetensors")
    assert tokenizer.brightest > 0 and load_prior(tmp_path / "run/prior/prior.safetensors")[0].layout.num_fields == 3
    metrics = json.loads((tmp_path / "run/eval/default/metrics.json").read_text())
    assert metrics["samples"]["num_samples"] == 8
    assert (tmp_path / "run/samples/grid.png").exists() and (tmp_path / "run/eval/default/report.html").exists()


def test_help_names_every_command(capsys):
    assert main([]) == 0
    help_text = capsys.readouterr().out
    for command in ("train-tokenizer", "cache-tokens", "train-prior", "eval", "sample", "photos"):
        assert command in help_text
