"""Nested tokens through every command, with what eval says of their order, and the comparison of orders."""

import json

import pytest
from PIL import Image

from pipeline.__main__ import main
from tests.pipeline.runs import write_tiny

NESTED = ("kind=nested", "num_tokens=6", "patch=4")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, many_images):
    """A run of nested tokens with priors of both orders, evaluated with each."""
    folder = tmp_path_factory.mktemp("nested")
    write_tiny(folder, many_images)
    common = [f"run={folder}/run", "images.val_share=0.8", "eval.num_images=72", *(f"tokenizer.{k}" for k in NESTED)]
    reversed_ = ["prior.order=reversed", f"prior.path={folder}/run/reversed/prior.safetensors"]

    def run(command, *keys):
        assert main([command, str(folder / "tiny.yaml"), *common, *keys]) == 0

    for command in ("train-tokenizer", "cache-tokens", "train-prior", "eval"):
        run(command)
    run("train-prior", *reversed_)
    run("eval", "eval.name=reversed", *reversed_)
    return folder, common


def read(folder, name):
    return json.loads((folder / "run" / "eval" / name / "metrics.json").read_text())


def test_eval_says_what_each_token_adds_and_how_it_follows(evaluated):
    metrics = read(evaluated[0], "default")
    order = metrics["order"]
    assert [entry["num_scales"] for entry in metrics["tokenizer"]["prefixes"]] == [1, 2, 4, 6]
    assert all("psnr_against_images" in entry for entry in metrics["tokenizer"]["prefixes"])
    assert order["prior_order"] == "natural" and len(order["bits_by_position"]) == 6
    assert sum(order["bits_by_position"]) == pytest.approx(metrics["rate"]["prior_bits_per_pixel"] * 16 * 16)
    scales = [scale["prior_bits"] for scale in metrics["rate"]["scales"]]
    assert scales == pytest.approx(order["bits_by_position"])
    assert len(order["gains"]["gain"]) == len(order["perplexity_by_position"]) == 6
    assert order["gains"]["psnr"][-1] == pytest.approx(metrics["tokenizer"]["psnr_mean_of_images"], abs=0.02)
    assert len(order["causality"]["natural"]["r2"]) == 5
    assert "ladder" not in metrics and any(line.startswith("ladder") for line in metrics["skipped"])
    report = (evaluated[0] / "run" / "eval" / "default" / "report.html").read_text()
    assert "Order of tokens" in report and "Against the original, dB" in report


def test_orders_ranks_both_with_the_bits_of_each_prior(evaluated, capsys):
    folder, common = evaluated
    runs = ",".join(str(folder / "run" / "eval" / name) for name in ("default", "reversed"))
    assert main(["orders", str(folder / "tiny.yaml"), *common, f"runs={runs}", f"out={folder}/orders"]) == 0
    rows = json.loads((folder / "orders" / "orders.json").read_text())["orders"]
    assert {row["order"] for row in rows} == {"natural", "reversed"} and len(rows) == 2
    assert rows[0]["mean_r2"] >= rows[1]["mean_r2"] and all(row["bits_per_token"] > 0 for row in rows)
    bits = {row["order"]: row["bits_by_position"] for row in rows}
    assert bits["natural"] == read(folder, "default")["order"]["bits_by_position"]
    assert bits["reversed"] == read(folder, "reversed")["order"]["bits_by_position"][::-1]
    assert Image.open(folder / "orders" / "orders.png").width > 600
    assert "run/reversed, reversed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["runs="], "runs= is empty"),
        (["runs=nowhere"], "metrics.json is missing"),
        (["runs={folder}/run/eval/default", "eval.num_images=8"], "eval.num_images=72, this CONFIG 8"),
    ],
)
def test_what_cannot_be_compared_is_named(evaluated, capsys, keys, message):
    folder, common = evaluated
    keys = [key.format(folder=folder) for key in keys]
    assert main(["orders", str(folder / "tiny.yaml"), *common, *keys]) == 2
    assert message in capsys.readouterr().err


def test_the_first_tokens_are_drawn_alone_in_natural_order_only(evaluated, capsys):
    folder, common = evaluated
    sample = ["sample", str(folder / "tiny.yaml"), *common, "count=1", f"out={folder}/samples", "sampling.scales=3"]
    assert main(sample) == 0
    assert main([*sample, f"prior.path={folder}/run/reversed/prior.safetensors"]) == 2
    assert "order reversed" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["upsample", "input=x.png"], ["edit", "input=x.png", "frozen=2"]])
def test_commands_that_need_a_causal_encoder_refuse(evaluated, tmp_path, monkeypatch, capsys, command):
    folder, common = evaluated
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    assert main([command[0], str(folder / "tiny.yaml"), *common, *command[1:]]) == 2
    assert "scale-causal encoder" in capsys.readouterr().err
