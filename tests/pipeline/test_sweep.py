"""sweep: every point of the grid with the figures that eval would give, the same seeds everywhere."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from pipeline.__main__ import main

SMALL = ("eval.num_images=12", "eval.num_samples=9", "eval.neighbours=2", "eval.timing_repeats=0")


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    run = f"run={folder}/run"
    config = str(folder / "tiny.yaml")
    assert main(["sweep", config, run, *SMALL, "guidances=1,3", "temperatures=0.5,1.0", "top_ks=0,2"]) == 0
    return config, run, folder / "run"


def test_the_grid_is_whole_and_in_order(swept):
    _, _, run = swept
    found = json.loads((run / "sweep/sweep.json").read_text())
    points = found["points"]
    grid = [(point["temperature"], point["top_k"], point["guidance"]) for point in points]
    assert grid == [(t, k, g) for t in (0.5, 1.0) for k in (0, 2) for g in (1, 3)]
    assert found["num_samples"] == 9 and found["seeds"] == [0, 8]
    assert all({"fd_lite0", "fd_classifier", "manifold_classifier", "class_accuracy"} <= set(point) for point in points)
    # real images do not depend on how samples are drawn
    assert len({point["fd_lite0_of_real_images"]["value"] for point in points}) == 1
    assert len({point["fd_lite0"]["value"] for point in points}) > 4


def test_a_point_is_what_eval_gives_with_its_settings(swept):
    config, run, folder = swept
    settings = ("sampling.guidance=3", "sampling.temperature=[0.5]", "sampling.top_k=[2]")
    assert main(["eval", config, run, *SMALL, *settings]) == 0
    samples = json.loads((folder / "eval/default/metrics.json").read_text())["samples"]
    point = json.loads((folder / "sweep/sweep.json").read_text())["points"][3]
    for key in ("fd_lite0", "fd_classifier"):
        assert point[key]["value"] == pytest.approx(samples[key]["value"], rel=1e-6)
    assert point["manifold_lite0"] == samples["manifold_lite0"] and point["kd_lite0"] == samples["kd_lite0"]
    assert point["class_accuracy"]["balanced"] == samples["class_accuracy"]["balanced"]


def test_the_table_has_a_line_a_point_and_the_plot_decodes(swept):
    _, _, run = swept
    text = (run / "sweep/sweep.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8 and len({row.count("|") for row in rows}) == 1
    assert "N = 9 < 2,048: biased; compare only at equal N" in text and "class accuracy" in rows[0]
    with Image.open(run / "sweep/sweep.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("guidances=1,x", "guidances=1,x; allowed: comma-separated numbers"),
        ("top_ks=1.5", "top_ks=1.5; allowed: comma-separated numbers"),
        ("temperatures=1,-1", "sampling.temperature=[-1.0]"),
        ("top_ks=-3", "sampling.top_k=[-3]"),
    ],
)
def test_a_point_that_cannot_be_sampled_is_refused_before_any_work(swept, tmp_path, capsys, asked, message):
    config, run, _ = swept
    assert main(["sweep", config, run, asked, f"out={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
