"""Priors of other orders through every command, on one token cache."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.layout import Tokens
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.evaluate_order import measure_order
from pipeline.models import load_models
from pipeline.orders import rows_of_run
from pipeline.report_curves import read_scalars
from pipeline.report_order import draw_order
from pipeline.studio_actions import Studio, Wish, draw_samples
from stages.measures.causality import measure_causality
from stages.weights import read_weights
from tests.pipeline.studio_pictures import GREEN, array, sampled
from tests.reliability.commands import octaves, signal_at, two


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """The finished run with priors in scale order and interleaved beside its own, the former evaluated."""
    folder = tmp_path_factory.mktemp("orders")
    shutil.copytree(finished / "run", folder / "run")
    shutil.copy(finished / "tiny.yaml", folder / "tiny.yaml")
    for order in ("scale", "interleaved"):
        assert main(["train-prior", *given(folder, order)]) == 0
    extra = ["eval.name=scale", "eval.upsample_from=8", "eval.num_upsampled=4", "eval.timing_repeats=1"]
    assert main(["eval", *given(folder, "scale"), *extra]) == 0
    return folder


def given(folder, order):
    """A config and keys of the prior in an order."""
    path = f"prior.path={folder}/run/{order}/prior.safetensors"
    return [str(folder / "tiny.yaml"), f"run={folder}/run", f"prior.order={order}", path]


def test_a_prior_in_scale_order_has_no_rate_anywhere(place, tmp_path):
    folder = place / "run/eval/scale"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rate"]["prior_bits_per_pixel"] is None and metrics["rate"]["fixed_length_bits_per_pixel"] > 0
    assert all(scale["prior_bits"] is None for scale in metrics["rate"]["scales"])
    assert metrics["order"]["bits_by_position"] is None and "calibration" not in metrics
    assert any("which is no likelihood" in line for line in metrics["skipped"])
    assert metrics["samples"]["num_samples"] == 8 and metrics["upsampling"]["num_images"] == 4
    assert len(metrics["ladder"]["sampling_time"]["rungs"]) == 3
    assert "Under the prior" not in (folder / "report.html").read_text()
    assert main(["rates", str(place / "tiny.yaml"), f"runs={folder}", f"out={tmp_path}/rates"]) == 0
    curves = json.loads((tmp_path / "rates/rates.json").read_text())["curves"]
    assert not any("under its prior" in curve["name"] for curve in curves)
    assert main(["compare", f"runs={folder},{folder}", f"out={tmp_path}/compare"]) == 0
    assert "Rate under the prior" not in (tmp_path / "compare/compare.md").read_text()


@pytest.mark.parametrize("order", ["natural", "reversed", "interleaved", "scale"])
def test_orders_gives_the_bits_to_the_order_of_the_prior(place, order):
    """A layout of two scales of two places; what was measured of it is made up."""
    metrics = json.loads((place / "run/eval/scale/metrics.json").read_text())
    curve = {"mean_r2": 0.5, "mean_r2_shuffled": 0.0, "r2": [0.5] * 3, "r2_shuffled": [0.0] * 3}
    permutation = {"reversed": [3, 2, 1, 0], "interleaved": [0, 2, 1, 3]}.get(order)
    causality = {"tokens": 4, "too_few_images": False, "natural": curve, "reversed": curve}
    if order == "interleaved":
        causality["interleaved"] = curve
    bits = None if order == "scale" else [1.0, 2.0, 3.0, 4.0]
    metrics["order"] = {
        **{"tokens": 4, "causality": causality, "prior_order": order, "permutation": permutation, "gains": None},
        "bits_by_position": bits,
    }
    folder = place / "run/eval" / f"made-up-{order}"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = {row["order"]: row["bits_by_position"] for row in rows_of_run(folder, load_config(place / "tiny.yaml"))}
    expected = {"natural": None, "reversed": None} | ({"interleaved": None} if order == "interleaved" else {})
    in_order = {"natural": [1, 2, 3, 4], "reversed": [4, 3, 2, 1], "interleaved": [1, 3, 2, 4]}
    assert rows == expected | ({} if order == "scale" else {order: in_order[order]})
    draw_order(metrics["order"], folder / "tokens.png")
    assert Image.open(folder / "tokens.png").width > 300


def test_the_order_of_the_prior_is_measured_beside_the_others(place):
    config = load_config(given(place, "interleaved")[0], given(place, "interleaved")[1:])
    models = load_models(config)
    ids = torch.randint(16, (64, 12, 1), generator=torch.Generator().manual_seed(0))
    made = SimpleNamespace(tokens=Tokens.fixed(ids))
    args = (None, made, None, [], 8, torch.device("cpu"), [])
    found = measure_order(place, models.tokenizer, models, *args)
    permutation = [scale * 4 + cell for cell in range(4) for scale in range(3)]
    assert found["permutation"] == permutation and found["prior_order"] == "interleaved"
    by_hand = measure_causality(models.tokenizer, made.tokens, {"mine": permutation})
    assert found["causality"]["interleaved"] == by_hand["mine"] != by_hand["natural"]


def test_logs_name_the_loss_for_what_it_is(place):
    scale, natural = read_scalars(place / "run/scale"), read_scalars(place / "run/prior")
    assert "validation/masked_bits_per_token/all" in scale and "train/masked_bits_per_token/all" in scale
    assert not any(name.startswith(("train/bits", "validation/bits")) for name in scale)
    assert "validation/bits_per_token/all" in natural


def test_all_that_a_beginning_can_do_works_in_scale_order(place, tmp_path, image_folder, capsys):
    keys, image = given(place, "scale"), f"input={image_folder}/green/000.png"
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    assert main(["sample", *keys, "count=2", "sampling.scales=2", "sampling.rounds=[3]", f"out={tmp_path}/s"]) == 0
    assert main(["edit", *keys, image, "frozen=1,2", f"out={tmp_path}/e"]) == 0
    assert main(["edit", *keys, image, "frozen=0", f"mask={tmp_path}/mask.png", f"out={tmp_path}/m"]) == 0
    Image.open(f"{image_folder}/green/000.png").resize((8, 8)).save(tmp_path / "small.png")
    assert main(["upsample", *keys, f"input={tmp_path}/small.png", f"out={tmp_path}/u"]) == 0
    assert main(["sweep", *keys, "guidances=2", f"out={tmp_path}/w"]) == 0
    assert main(["export", *keys, f"out={tmp_path}/x"]) == 0
    assert "Rate under the prior" not in (tmp_path / "x/README.md").read_text()
    config = load_config(keys[0], keys[1:])
    done = []
    drawn = draw_samples(Studio(config, load_models(config)), Wish(GREEN, count=2, seed=4), done.append)
    assert done[-1] == 1 and len(done) == 3 and [number for number, _ in drawn.steps] == [1, 2, 3]
    written = sampled(place, tmp_path / "n", *keys[2:], "classes=green", "count=2", "seed=4")
    shown = {f"{picture.name}.png": array(picture.pixels) for picture in drawn.shown(2)}
    assert shown.keys() == written.keys() and all((shown[name] == written[name]).all() for name in written)
    capsys.readouterr()
    assert main(["sample", *given(place, "interleaved"), "sampling.scales=2", f"out={tmp_path}/i"]) == 2
    assert "order interleaved" in capsys.readouterr().err
    assert main(["sample", *given(place, "scale")[:2], "sampling.rounds=[3]", f"out={tmp_path}/i"]) == 2
    assert "leave them out, or set prior.order=scale" in capsys.readouterr().err


def test_a_broken_run_goes_on_to_the_same_bits_and_two_processes_agree(place, tmp_path):
    common = [*given(place, "scale")[:3], f"tokens.path={place}/run/tokens"]

    def call(name):
        return ["train-prior", *common, f"prior.path={tmp_path}/{name}/prior.safetensors"]

    def weights(name):
        return read_weights(tmp_path / name / "prior.safetensors")[1]

    assert octaves(tmp_path, *call("whole")).code == 0
    at = "stages.prior.module:PriorModule.training_step"
    assert octaves(tmp_path, *call("broken"), setup=signal_at(signal.SIGTERM, at, 5)).code == 75
    again = octaves(tmp_path, *call("broken"))
    assert again.code == 0 and "continuing from" in again.said
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert [rank.code for rank in two(tmp_path, *call("both"))] == [0, 0]
    assert weights("both").keys() == whole.keys()
