"""compare: differences where two evaluations may be compared, and the reason where they may not."""

from __future__ import annotations

import copy
import json

import pytest

from pipeline.__main__ import main

IMAGES = {
    "kind": "photos",
    "path": None,
    "size": 64,
    "channels": 3,
    "eval_view": "center",
    "val_share": 0.1,
    "split_seed": 0,
}


def evaluation() -> dict:
    """A result as eval writes it, cut to what is compared."""
    distance = {"value": 20.0, "same_backbone_as_loss": True, "bias": "N = 500 < 2,048: biased"}
    return {
        "settings": {
            "config": {"name": "a", "run": "a", "images": dict(IMAGES), "eval": {"neighbours": 5, "batch_size": 100}},
            "tokenizer": {"sha256": "1"},
            "fd_lite0": "lite0, 112 channels",
            "device": "cpu",
            "threads": 1,
        },
        "tokenizer": {"num_images": 500, "psnr_mean_of_images": 25.0},
        "rate": {"fixed_length_bits_per_pixel": 0.5, "prior_bits_per_pixel": 0.25, "prior_bits_per_token": 8.0},
        "samples": {
            "num_samples": 500,
            "prompts": "none",
            "images_per_second": 10.0,
            "fd_lite0": distance,
            "kd_lite0": {"mean": 2.0, "same_backbone_as_loss": True},
        },
    }


def compared(tmp_path, *results: dict) -> tuple[dict[str, dict], str, dict]:
    """(rows by title, table, all) of evaluations written as runs a, b, …"""
    folders = []
    for name, result in zip("abc", results, strict=False):
        folder = tmp_path / name / "eval/default"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(result))
        folders.append(str(folder))
    assert main(["compare", f"runs={','.join(folders)}", f"out={tmp_path}/out"]) == 0
    found = json.loads((tmp_path / "out/compare.json").read_text())
    return {row["title"]: row for row in found["figures"]}, (tmp_path / "out/compare.md").read_text("utf-8"), found


def test_differences_are_against_the_first_and_know_what_is_better(tmp_path):
    first, second = evaluation(), evaluation()
    second["tokenizer"]["psnr_mean_of_images"] = 24.0
    second["samples"]["fd_lite0"]["value"] = 15.0
    second["settings"]["config"]["name"] = "b"
    third = evaluation()
    del third["samples"]
    rows, table, found = compared(tmp_path, first, second, third)
    assert [run["name"] for run in found["runs"]] == ["a", "b", "c"]
    assert rows["PSNR of reconstructions, dB"]["differences"] == [None, -1, 0]
    assert rows["fd_lite0 of samples"]["values"] == [20, 15, None]
    assert rows["fd_lite0 of samples"]["differences"] == [None, -5, None]
    line = next(line for line in table.splitlines() if line.startswith("| fd_lite0 of samples"))
    assert line == "| fd_lite0 of samples | 20 * † | 15 * † | -5 ✓ | – | – |"
    assert "| PSNR of reconstructions, dB | 25 | 24 | -1 ✗ | 25 | 0 |" in table
    assert "SSIM" not in table and "fid" not in table
    assert found["settings_that_differ"] == {}


def test_other_images_are_never_subtracted(tmp_path):
    first, second = evaluation(), evaluation()
    second["settings"]["config"]["images"]["split_seed"] = 1
    rows, table, found = compared(tmp_path, first, second)
    images = [row for title, row in rows.items() if title != "Sampling, images/s"]
    assert images and all(row["differences"] == [None, None] for row in images)
    assert all("split_seed 0 / 1" in row["not_comparable"][1] for row in images)
    assert found["settings_that_differ"] == {"images.split_seed": [0, 1]} and "| images.split_seed | 0 | 1 |" in table


@pytest.mark.parametrize(
    ("change", "title", "reason"),
    [
        (("samples", "num_samples", 1000), "fd_lite0 of samples", "num_samples 500 / 1000"),
        (("tokenizer", "num_images", 200), "fd_lite0 of samples", "num_images 500 / 200"),
        (("settings", "fd_lite0", "another"), "fd_lite0 of samples", "fd_lite0 lite0, 112 channels / another"),
        (("settings", "device", "H100"), "Sampling, images/s", "device cpu / H100"),
        (("settings", "tokenizer", {"sha256": "2"}), "Bits a token", "sha256 1 / 2"),
    ],
)
def test_what_a_figure_depends_on_is_named_where_it_differs(tmp_path, change, title, reason):
    first = evaluation()
    second = copy.deepcopy(first)
    section, key, value = change
    second[section][key] = value
    rows, table, _ = compared(tmp_path, first, second)
    assert rows[title]["differences"] == [None, None] and rows[title]["not_comparable"] == [None, reason]
    assert f"not comparable: {reason}" in table
    # the kernel distance is unbiased: another N alone does not forbid it
    if key in ("num_samples", "num_images"):
        assert rows["kd_lite0 of samples"]["differences"] == [None, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs={folder}"], "two or more evaluation folders"),
        (["runs={folder},nowhere"], "nowhere/metrics.json is missing"),
        (["photos64", "runs={folder},{folder}"], "compare: 'photos64'; allowed: runs=folder,folder and out=folder"),
        (["runs={folder},{empty}"], "is not the result of an evaluation"),
        (["runs={folder},{broken}"], "is not valid JSON"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message):
    for name, text in (("folder", json.dumps(evaluation())), ("empty", "{}"), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    places = {name: tmp_path / name for name in ("folder", "empty", "broken")}
    assert main(["compare", *(item.format(**places) for item in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
