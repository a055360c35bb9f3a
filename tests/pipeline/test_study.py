"""study: cells that are trained once, tables of what came out, and what happens when a cell fails or is stopped."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys

import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.config import ConfigError
from pipeline.processes import REQUEUE
from pipeline.studies.plan import CONFIG_FOLDER, cells_of, find_study, load_study
from pipeline.studies.table import markdown, spread, values_of
from pipeline.studies.train import Job, Outcome, next_stage
from tests.waiting import wait_until

STUDY = """
question: Which is nearer?
config: {config}
keys:
  tokenizer_training.adversarial_weight: 0
  eval.classifier: false
  eval.timing_repeats: 0
seeds: [0, 1]
figures: [tokenizer.psnr_mean_of_images, codes.*.perplexity, rate.prior_bits_per_pixel]
plot: [tokenizer.psnr_mean_of_images]
arms:
  - {{name: dense, keys: {{tokenizer.attention: sit}}}}
  - {{name: same, keys: {{tokenizer.attention: sit}}, seeds: [0]}}
  - {{name: with-prior, keys: {{tokenizer.attention: sit}}, seeds: [0], prior: true}}
"""


@pytest.fixture
def study(tiny, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(STUDY.format(config=tiny))
    return path


def run(study, out, *more):
    return main(["study", str(study), f"out={out}", *more])


def rows_of(out):
    return json.loads((out / "toy/study.json").read_text())["cells"]


def test_first_seeds_come_first_and_equal_cells_share_what_they_have_in_common(study, tmp_path):
    cells = cells_of(load_study(study), tmp_path)
    assert [(cell.arm, cell.seed) for cell in cells] == [("dense", 0), ("same", 0), ("with-prior", 0), ("dense", 1)]
    first, same, prior, second = cells
    assert first.run == same.run == prior.run != second.run
    assert first.metrics == same.metrics != prior.metrics
    assert [name for name, _ in first.stages] == ["train-tokenizer", "eval"]
    assert [name for name, _ in prior.stages] == ["train-tokenizer", "cache-tokens", "train-prior", "eval"]
    changed = cells_of(load_study(study), tmp_path, ["tokenizer_training.max_steps=7"])
    sampled = cells_of(load_study(study), tmp_path, ["prior.depth=2"])
    assert changed[0].run != first.run
    assert sampled[0].metrics == first.metrics and sampled[2].run == prior.run
    assert sampled[2].config.prior.path != prior.config.prior.path and sampled[2].metrics != prior.metrics


def test_writing_a_default_out_changes_no_name(study, tmp_path):
    cells = [
        cells_of(load_study(study), tmp_path, more)[0].run
        for more in ([], ["tokenizer.specialised=true"], ["tokenizer.specialised=false"])
    ]
    assert cells[0] == cells[1] != cells[2]
    kind = "tokenizer.quantizer.kind=fsq"  # not the kind of the default quantiser
    cells = [
        cells_of(load_study(study), tmp_path, [kind, f"tokenizer.quantizer.levels={levels}"])[0].run
        for levels in ([8, 5, 5, 5], [8, 8, 8])
    ]
    assert cells_of(load_study(study), tmp_path, [kind])[0].run == cells[0] != cells[1]


def test_every_shipped_study_has_cells_that_load():
    for path in sorted((CONFIG_FOLDER / "studies").glob("*.yaml")):
        study = load_study(find_study(path.stem))
        cells = cells_of(study, CONFIG_FOLDER)
        assert len({(cell.arm, cell.seed) for cell in cells}) == len(cells) > 1, path.name
        assert set(study.plot) <= set(study.figures), path.name


@pytest.mark.slow
def test_a_study_is_trained_once_and_tabled(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(study, out, "jobs=2") == 0
    rows = rows_of(out)
    assert [row["state"] for row in rows] == ["done"] * 4
    made = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    assert len(made) == 3  # two tokenizers, one prior
    psnr = [row["figures"]["tokenizer.psnr_mean_of_images"] for row in rows]
    assert psnr[0] == psnr[1] == psnr[2] != psnr[3]
    assert [row["figures"]["rate.prior_bits_per_pixel"] is None for row in rows] == [True, True, False, True]
    assert len(rows[0]["figures"]["codes.*.perplexity"]) == 3
    assert all(row["tokenizer_parameters"] > 1000 for row in rows)
    assert all(row["training"]["cpu_minutes"] > 0 and row["training"]["peak_megabytes"] > 100 for row in rows)

    table = (out / "toy/table.md").read_text().splitlines()
    lines = {line.split(" | ")[0].strip("| "): line for line in table if line.startswith("| ")}
    mean, deviation = statistics.fmean((psnr[0], psnr[3])), statistics.stdev((psnr[0], psnr[3]))
    assert f"± {deviation:.2g}" in lines["dense"] and lines["dense"].split(" | ")[1] == "2"
    assert f"{mean:.4g}"[:4] in lines["dense"] and "±" not in lines["same"]
    with (out / "toy/cells.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["tokenizer.psnr_mean_of_images"]) for row in written] == psnr
    assert Image.open(out / "toy/plot.png").size[0] > 300

    assert run(study, out) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")} == made

    # as a version with another default would find it
    path = cells_of(load_study(study), out / "runs")[3].run / "tokenizer/config.yaml"
    path.write_text(path.read_text().replace("perceptual_weight: ", "perceptual_weight: 7"))
    assert run(study, out, "train=false") == 2
    rows = rows_of(out)
    assert [row["state"] for row in rows[:3]] == ["done"] * 3
    assert "another config (tokenizer_training.perceptual_weight: 7" in rows[3]["state"]
    assert rows[3]["figures"]["tokenizer.psnr_mean_of_images"] is None
    assert "| dense | 1 |" in (out / "toy/table.md").read_text()


def test_cells_wait_for_a_stage_that_they_share_and_for_no_other(study, tmp_path):
    text = study.read_text() + "  - {name: deep, keys: {tokenizer.attention: sit, prior.depth: 2}, prior: true}\n"
    study.write_text(text.replace("seeds: [0, 1]", "seeds: [0]"))
    cells = cells_of(load_study(study), tmp_path)
    _, _, shallow, deep = cells
    assert shallow.run == deep.run
    running, outcome = [], Outcome()

    def begin():
        found = next_stage(cells, running, outcome)
        if found is not None:
            running.append(Job(*found, 0.0))
        return found

    def finish(job):
        job.made.parent.mkdir(parents=True, exist_ok=True)
        job.made.touch()
        running.remove(job)

    assert begin() == (cells[0], "train-tokenizer") and begin() is None
    finish(running[0])
    assert begin() == (cells[0], "eval") and begin() == (shallow, "cache-tokens") and begin() is None
    finish(running[1])
    assert begin() == (shallow, "train-prior") and begin() == (deep, "train-prior")
    assert len({job.log for job in running}) == 3


def test_what_does_not_fit_is_not_run(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(study, out, "minutes=0") == 0
    assert {row["state"] for row in rows_of(out)} == {"not run"} and "| not run |" in capsys.readouterr().out


@pytest.mark.slow
def test_what_fails_stops_only_itself(study, tmp_path, capsys):
    out = tmp_path / "out"
    text = study.read_text() + "  - {name: broken, keys: {tokenizer.patch: 3}, seeds: [0]}\n"
    study.write_text(text)
    assert run(study, out, "only=dense,broken") == 2
    states = {(row["arm"], row["seed"]): row["state"] for row in rows_of(out)}
    assert states["broken", 0].startswith("failed: octaves: images.size=16")
    assert states["dense", 0] == states["dense", 1] == states["same", 0] == "done"
    assert states["with-prior", 0] == "not run"
    assert "1 of 5 cells failed; the first, broken with seed 0" in capsys.readouterr().err
    assert len(list((out / "runs").rglob("study-tokenizer.log"))) == 3


@pytest.mark.slow
def test_sigterm_reaches_the_stage_which_saves_and_the_next_call_goes_on(study, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline", "study", str(study), f"out={out}", "only=dense"]
    command.append("tokenizer_training.max_steps=100000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_until(lambda: list((out / "runs").glob("*/tokenizer/checkpoints/*.ckpt")), "a checkpoint")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == REQUEUE
    log = next((out / "runs").glob("*/study-tokenizer.log")).read_text()
    assert "run the same command again" in log.splitlines()[-1]
    assert rows_of(out)[0]["state"] == "not run" and rows_of(out)[0]["training"]["cpu_minutes"] > 0


def test_a_figure_may_name_every_entry_of_a_list():
    metrics = {"codes": [{"perplexity": 2}, {"perplexity": 3.5}], "rate": {"bits": 1}, "none": None}
    assert values_of(metrics, "codes.*.perplexity") == (2.0, 3.5)
    assert values_of(metrics, "rate.bits") == 1.0
    assert values_of(metrics, "none") is values_of(metrics, "codes.*.other") is values_of(metrics, "no.*.list") is None


def test_a_figure_that_is_no_number_is_named():
    for value in ({"value": 1.0}, "cpu", True):
        with pytest.raises(ConfigError, match="rate.bits is not a number"):
            values_of({"rate": {"bits": value}}, "rate.bits")


def test_spread_is_the_mean_and_the_sample_deviation():
    assert spread([1.0, 3.0]) == "2 ± 1.4" and spread([1.25, None]) == "1.25"
    assert spread([None]) == spread([]) == "–"
    assert spread([(1.0, 10.0), (3.0, 10.0)]) == "2 ± 1.4, 10 ± 0"


def test_memory_is_the_most_of_those_that_were_counted(study):
    figures = {key: 1.0 for key in load_study(study).figures}
    row = {"arm": "dense", "state": "done", "tokenizer_parameters": 10, "prior_parameters": None, "figures": figures}
    spent = [{"cpu_minutes": 1.0, "peak_megabytes": peak} for peak in (None, 1400.0, 900.0)]
    rows = [row | {"seed": seed, "training": each} for seed, each in enumerate(spent)]
    assert "| dense | 3 | 10 | 1.0 | 1,400 |" in markdown(load_study(study), "toy", rows)
    assert "| dense | 1 | 10 | 1.0 | – |" in markdown(load_study(study), "toy", rows[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("question: x\n", "arms"),
        ("question: x\nspeed: 3\narms: [{name: a}]\n", "speed"),
        ("question: x\narms: [{name: a}, {name: a}]\n", "each once"),
        ("question: x\narms: [{name: a/b}]\n", "letters, digits"),
        ("question: x\narms: []\n", "needs an arm"),
        ("question: x\nseeds: [0, 0]\narms: [{name: a}]\n", "each once"),
        ("question: x\narms: [{name: a, seeds: []}]\n", "seeds of arm a"),
        ("question: x\narms: [{name: a, keys: {seed: 3}}]\n", "seed cannot be set in a study"),
        ("question: x\nkeys: {trainer.devices: 2}\narms: [{name: a}]\n", "trainer.devices cannot be set"),
        ("question: x\nplot: []\narms: [{name: a}]\n", "plot="),
        ("question: x\nplot: [speed]\narms: [{name: a}]\n", "plot="),
        ("question: x\narms: [{name: a, keys: {tokenizer.nonsense: 3}}]\n", "arm a: .*nonsense"),
        ("- 1\n", "mapping"),
    ],
)
def test_a_study_that_cannot_be_read_says_so_in_one_line(tmp_path, capsys, change, message):
    path = tmp_path / "toy.yaml"
    path.write_text(change)
    assert main(["study", str(path), f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["jobs=0"], "jobs=0; allowed: 1 or more"),
        (["minutes=x"], "minutes=x; allowed: a number"),
        (["only=nobody"], "only=nobody: no such arm; allowed: dense"),
        (["train=maybe"], "allowed: true or false"),
        (["tokenizer.patch"], "not an override"),
        (["seed=3"], "seed cannot be set in a study"),
        (["tokenizer.path=elsewhere"], "tokenizer.path cannot be set"),
    ],
)
def test_wrong_keys_are_refused(study, tmp_path, capsys, keys, message):
    assert run(study, tmp_path / "out", *keys) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_study_lists_the_shipped_ones(capsys):
    assert main(["study", "no-such"]) == 2
    assert "a-scales" in capsys.readouterr().err
    assert main(["study"]) == 2
