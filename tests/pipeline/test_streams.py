"""A codec without training through all commands: streams in the cache, the prior, evaluation, samples and edits."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from data.tokens.module import TokenDataModule
from data.tokens.reader import TokenReader
from stages.factory import build_grammar
from stages.weights import load_prior, load_tokenizer
from tests.pipeline.runs import caller, stop_after_two, train_all, write_tiny

SIDE = 8
"""A stream has a few tokens for every pixel."""
BITPLANES = (
    *("tokenizer.kind=bitplane", "tokenizer.final_threshold=0.5", "tokenizer.wavelet=haar"),
    *("images.flip=true", f"images.size={SIDE}"),
)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, image_folder):
    """A finished run over bit-planes and its YAML; the stages were trained for three steps."""
    folder = tmp_path_factory.mktemp("streams")
    write_tiny(folder, image_folder)
    train_all(made_with(folder), "prior_training.max_steps=3")
    return folder


def made_with(folder):
    return caller(folder, *BITPLANES)


def test_stage_one_only_fits_and_the_cache_holds_whole_streams(streams):
    tokenizer, metadata = load_tokenizer(streams / "run/tokenizer/tokenizer.safetensors")
    assert metadata["steps"] == 0 and not tokenizer.state_dict()
    assert sum(tokenizer.statistics()["counts"][-1]) == 16  # fit_images
    assert len(tokenizer.statistics()["counts"]) == 4  # three classes, and all
    reader = TokenReader(streams / "run/tokens", "train")
    assert len(set(reader.lengths.tolist())) > 1
    batch = reader.read(np.arange(len(reader)), 1)
    assert batch["header"].shape == (48, 1)
    # the flipped view is another stream of the same image
    assert not np.array_equal(batch["ids"], reader.read(np.arange(len(reader)), 0)["ids"])
    assert np.array_equal(reader.lengths, reader.read(np.arange(len(reader)), 0)["length"])


def test_the_prior_resumes_in_the_middle_of_a_bucket(streams, tmp_path, capsys):
    """Stopped after two of four steps and continued, the weights are those of an uninterrupted run."""
    call, settings = made_with(streams), ("prior_training.max_steps=4", "prior_training.bucket_batches=3")
    settings += ("prior_training.checkpoint_every=2",)
    weights = []
    for name, parts in (("whole", [()]), ("halves", [("stop",), ()])):
        path = f"prior.path={tmp_path}/{name}/prior.safetensors"
        for part in parts:
            if part:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("stages.prior.module.PriorModule.on_train_batch_end", stop_after_two, raising=False)
                    with pytest.raises(SystemExit):
                        call("train-prior", path, *settings)
            else:
                assert call("train-prior", path, *settings) == 0
        assert ("continuing from" in capsys.readouterr().out) == (name == "halves")
        weights.append(load_prior(tmp_path / name / "prior.safetensors")[0].state_dict())
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_eval_shows_rates_growth_and_other_settings(streams, capsys):
    call = made_with(streams)
    assert call("eval", "eval.grids=['top_p=[0.6]','top_k=[2]']", "eval.batch_size=5") == 0
    folder = streams / "run/eval/default"
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["streams"]
    assert found["prefixes"][-1]["prior_bits_per_pixel"] == pytest.approx(found["prior_bits"] / SIDE**2)
    rate = metrics["rate"]
    assert found["prior_bits"] == pytest.approx(rate["prior_bits_per_pixel"] * SIDE**2) and found["header_bits"] > 0
    by_scale = sum(scale["prior_bits"] for scale in rate["scales"])
    assert found["prior_bits"] == pytest.approx(by_scale + found["header_bits"])
    psnr = [entry["psnr_mean_of_images"] for entry in found["prefixes"]]
    assert psnr == [entry["psnr_mean_of_images"] for entry in metrics["tokenizer"]["prefixes"]]
    assert psnr[-1] == pytest.approx(metrics["tokenizer"]["psnr_mean_of_images"]) and psnr[-1] > psnr[0]
    names = {path.name for path in folder.glob("*.png")}
    assert {"growing.png", "finished.png", "samples_top_p_0.6.png", "samples_top_k_2.png", "prefixes.png"} <= names
    page = (folder / "report.html").read_text()
    for words in ("Growing samples", "Finished images", "Samples with top_p_0.6", "tokens that cannot come"):
        assert words in page
    rates = streams / "rates"
    assert call("rates", f"runs={folder}", f"out={rates}", "eval.num_images=3") == 2
    assert "eval.num_images=8, this CONFIG 3" in capsys.readouterr().err
    assert call("rates", f"runs={folder}", f"out={rates}") == 0
    curves = {curve["name"]: curve["points"] for curve in json.loads((rates / "rates.json").read_text())["curves"]}
    assert set(curves) == {
        "tiny, under its prior",
        "tiny, without a prior",
        *("PNG", "WebP, lossless", "JPEG", "WebP", "JPEG 2000"),
    }
    assert curves["PNG"][0]["psnr"] is None and curves["WebP, lossless"][0]["psnr"] is None
    for name in ("JPEG", "WebP", "JPEG 2000"):
        sizes = [point["bits_per_pixel"] for point in curves[name]]
        assert sizes[0] < sizes[-1] and curves[name][0]["psnr"] < curves[name][-1]["psnr"]
    assert Image.open(rates / "rates.png").size[0] > 500


def test_a_prior_of_beginnings_is_evaluated_without_their_rate(streams, tmp_path, capsys):
    call, path = made_with(streams), f"prior.path={tmp_path}/prior.safetensors"
    assert call("train-prior", path, "prior.max_length=20", "prior_training.max_steps=1") == 0
    said = capsys.readouterr().out
    assert "are longer than prior.max_length=20 and cut" in said and "0 of 48" not in said
    assert call("eval", path, "eval.name=cut") == 0
    found = json.loads((streams / "run/eval/cut/metrics.json").read_text())["streams"]
    assert found["cut_share"] > 0 and found["prior_bits"] is None
    Image.effect_noise((SIDE, SIDE), 90).convert("RGB").save(tmp_path / "noise.png")
    assert call("edit", path, f"input={tmp_path}/noise.png", "frozen=2") == 2
    assert "tokens are given, but this prior models 20" in capsys.readouterr().err


def test_loader_processes_get_what_they_need(streams):
    """A started (not forked) loader process unpickles its data set."""
    module = TokenDataModule(streams / "run/tokens", 4, 0, 0, 8, bucket_batches=4)
    grammar = build_grammar(module.manifest.layout)
    module.cut_and_note(30, grammar.annotate)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batch = next(iter(loader))
        again = pickle.loads(pickle.dumps(loader.dataset))
        assert type(again) is type(loader.dataset) and batch["notes"].shape == (
            *batch["ids"].shape[:2],
            grammar.num_notes,
        )
        assert batch["ids"].shape[1] <= 30
    first = [(0, 3), (0, 5)]
    train = module.train_dataloader().dataset
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            train.__getitems__(first).values(),
            pickle.loads(pickle.dumps(train)).__getitems__(first).values(),
            strict=True,
        )
    )


def test_a_dark_image_has_no_coarse_planes_to_keep(streams, tmp_path, capsys):
    Image.new("RGB", (SIDE, SIDE), (12, 10, 11)).save(tmp_path / "dark.png")
    assert made_with(streams)("edit", f"input={tmp_path}/dark.png", "frozen=1", f"out={tmp_path}/e") == 2
    assert "frozen=1: the first 1 of" in capsys.readouterr().err


def test_samples_stop_at_a_plane_and_images_are_finished(streams, tmp_path, image_folder, capsys):
    call = made_with(streams)
    assert call("sample", "count=1", f"out={tmp_path}/all") == 0
    assert call("sample", "count=1", "sampling.scales=1", f"out={tmp_path}/one") == 0
    whole, one = (np.array(Image.open(tmp_path / name / "red-000002.png")) for name in ("all", "one"))
    assert whole.shape == one.shape == (SIDE, SIDE, 3)
    picture = image_folder / "red/000.png"
    assert call("edit", f"input={picture}", "frozen=2", "count=2", f"out={tmp_path}/edited") == 0
    assert len(list((tmp_path / "edited").glob("*.png"))) == 3
    assert call("edit", f"input={picture}", "frozen=2", f"mask={picture}", f"out={tmp_path}/masked") == 2
    assert "a mask needs tokens with a position" in capsys.readouterr().err
    assert call("upsample", f"input={picture}", f"out={tmp_path}/up") == 2
    assert "scale-causal encoder" in capsys.readouterr().err


def test_speed_is_measured(streams, capsys):
    assert made_with(streams)("bench", "parts=tokenizer", "repeats=2", f"out={streams}/bench.json") == 0
    found = json.loads((streams / "bench.json").read_text())["figures"]
    assert [figure["name"] for figure in found] == ["encode", "decode", "annotate"]
    assert all(figure["spread"][0] <= figure["value"] <= figure["spread"][1] for figure in found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("images.size=24",), "a side of 24 pixels; allowed: powers of two from 4, e.g. 16 or 32"),
        (("tokenizer.variant=trees",), "tokenizer.variant='trees'; allowed: blocks, zerotree"),
        (("prior.max_length=0",), "prior.max_length=0; allowed: 1 or more"),
        (("prior_training.bucket_batches=0",), "prior_training.bucket_batches=0; allowed: 1 or more"),
    ],
)
def test_wrong_keys_end_in_one_line(streams, tmp_path, capsys, overrides, message):
    path = f"tokenizer.path={tmp_path}/tokenizer.safetensors"
    assert made_with(streams)("train-tokenizer", path, *overrides) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grid", "message"),
    [("top_q=[1]", "eval.grids: top_q=[1]"), ("top_p=[2]", "sampling.top_p=[2.0]"), ("top_p=0.6", "eval.grids: top_p")],
)
def test_wrong_grids_end_before_any_work(streams, capsys, grid, message):
    assert made_with(streams)("eval", f"eval.grids=['{grid}']", "eval.name=wrong") == 2
    assert message in capsys.readouterr().err
    assert not (streams / "run/eval/wrong").exists()


def test_a_fixed_start_that_is_too_low_names_the_right_one(streams, tmp_path, capsys):
    path = f"tokenizer.path={tmp_path}/tokenizer.safetensors"
    assert made_with(streams)("train-tokenizer", path, "tokenizer.start_threshold=1.0") == 2
    assert "use 2 or more, or 0 for each image's own" in capsys.readouterr().err
