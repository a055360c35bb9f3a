"""Lists of DCT coefficients through all commands: cache, prior, evaluation, samples, colouring and upsampling."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.tokens.manifest import Manifest
from data.tokens.reader import TokenReader
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.evaluate_streams import show_finished
from pipeline.evaluation_images import Images
from pipeline.models import Models, load_models
from stages.codecs.sparse_dct import SparseDCTCodec, SparseDCTConfig
from stages.weights import load_prior, load_tokenizer, save_tokenizer
from tests.pipeline.runs import caller, stop_after_two, train_all, write_tiny
from tests.reliability.commands import two

LISTS = (
    *("tokenizer.kind=sparse-dct", "tokenizer.quality=30", "tokenizer.block=4", "images.flip=true"),
    *("prior.kind=chunked", "prior.width=32", "prior.heads=4", "prior.encoder_depth=1", "prior.channel_depth=1"),
    *("prior.position_depth=1", "prior.value_depth=1", "prior.chunk=16", "prior.overlap=4"),
)


def made_with(folder, *more):
    return caller(folder, *LISTS, *more)


@pytest.fixture(scope="module")
def lists(tmp_path_factory, image_folder):
    """A finished run over lists and its YAML, with priors of both orders; they were trained for some steps."""
    folder = tmp_path_factory.mktemp("lists")
    write_tiny(folder, image_folder)
    call = made_with(folder)
    train_all(call, "prior_training.max_steps=6")
    luma = (f"prior.path={folder}/luma/prior.safetensors", "prior.order=luma_first")
    assert call("train-prior", "prior_training.max_steps=6", *luma) == 0
    return folder


@pytest.fixture(scope="module")
def luma(lists):
    return made_with(lists, f"prior.path={lists}/luma/prior.safetensors", "prior.order=luma_first")


def test_the_cache_holds_whole_lists_and_what_was_remarked(lists, capsys):
    tokenizer, metadata = load_tokenizer(lists / "run/tokenizer/tokenizer.safetensors")
    assert metadata["steps"] == 0 and metadata["statistics"]["largest"] == tokenizer.largest
    reader = TokenReader(lists / "run/tokens", "train")
    batch = reader.read(np.arange(len(reader)), 1)
    lasts = batch["ids"][np.arange(len(reader)), batch["length"] - 1, 0]
    assert (lasts == tokenizer.grammar.end).all() and len(set(batch["length"].tolist())) > 1
    manifest = Manifest.load(lists / "run/tokens")
    assert set(manifest.splits["train"].remarks) == {"values_clipped"}
    assert made_with(lists)("cache-tokens") == 0  # nothing is missing: it is not made again
    assert "complete" in capsys.readouterr().out


def test_clipped_values_and_lower_quality_are_counted(lists, tmp_path, capsys):
    call = made_with(
        lists,
        *(f"tokenizer.path={tmp_path}/t/tokenizer.safetensors", f"tokens.path={tmp_path}/tokens"),
        *("tokenizer.overflow=lower", "tokenizer.max_length=60", "tokenizer.largest_value=5"),
    )
    assert call("train-tokenizer") == 0 and call("cache-tokens") == 0
    manifest = Manifest.load(tmp_path / "tokens")
    tokenizer, _ = load_tokenizer(tmp_path / "t/tokenizer.safetensors")
    for name, split in manifest.splits.items():
        reader = TokenReader(tmp_path / "tokens", name)
        views = [reader.read(np.arange(len(reader)), view) for view in (0, 1)]
        lowered = int((views[0]["header"] > 0).sum())  # images, not their mirrored views
        assert split.remarks["images_of_lower_quality"] == lowered > 0
        assert split.remarks["values_clipped"] > 0
        assert max(int(view["length"].max()) for view in views) <= 60
        assert all(int(abs(v["ids"][..., 2].astype(int) - tokenizer.largest).max()) <= 5 for v in views)
    shards = sum((split.shards for split in manifest.splits.values()), ())
    assert sum(shard.remarks["values_clipped"] for shard in shards) == sum(
        split.remarks["values_clipped"] for split in manifest.splits.values()
    )
    said = capsys.readouterr().out
    assert "images of lower quality" in said and "values clipped" in said


def test_a_list_beyond_the_cap_is_refused_by_name(lists, tmp_path, capsys):
    call = made_with(
        lists,
        *(f"tokenizer.path={tmp_path}/t/tokenizer.safetensors", f"tokens.path={tmp_path}/tokens"),
        *("tokenizer.max_length=60", "tokenizer.largest_value=90"),
    )
    assert call("train-tokenizer") == 2
    said = capsys.readouterr().err
    assert re.search(
        r"train image \w+/\d+.png: a list of \d+ elements at quality 30, but tokenizer.max_length=60", said
    )
    # measured where all fit, met by a cap that came later: the cache names the image
    assert call("train-tokenizer", "tokenizer.max_length=0", f"tokenizer.path={tmp_path}/u/tokenizer.safetensors") == 0
    tokenizer, metadata = load_tokenizer(tmp_path / "u/tokenizer.safetensors")
    capped = SparseDCTCodec(SparseDCTConfig(**{**metadata["config"], "max_length": 60}), (16, 16), 3)
    capped.restore(tokenizer.statistics())
    save_tokenizer(tmp_path / "t/tokenizer.safetensors", capped, capped.config)
    assert call("cache-tokens") == 2
    assert re.search(r"the (train|val) image \w+/\d+.png: a list of \d+ elements", capsys.readouterr().err)


def test_evaluation_of_lists(lists):
    call = made_with(lists)
    assert call("eval", "eval.upsample_from=8", "eval.num_upsampled=4", "sampling.temperature=[0.5]") == 0
    folder = lists / "run/eval/default"
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics["lists"]
    assert sum(scale["share"] for scale in found["scales"]) == pytest.approx(1)
    assert sum(scale["elements"] for scale in found["scales"]) == pytest.approx(found["mean_length"])
    for side in (4, 8, 16):
        mine = [entry for entry in found["tried"] if entry["side"] == side]
        assert [entry["quality"] for entry in mine] == [10, 20, 30, 35, 50, 80, 95]
        lengths = [entry["mean_length"] for entry in mine]
        assert lengths == sorted(lengths) and mine[-1]["psnr_mean_of_images"] > mine[0]["psnr_mean_of_images"] + 3
    own = next(entry for entry in found["tried"] if entry["side"] == 16 and entry["quality"] == 30)
    assert own["mean_length"] == pytest.approx(found["mean_length"])
    streams = metrics["streams"]
    against_images = [entry["psnr_mean_of_images"] for entry in streams["prefixes"]]
    assert against_images == sorted(against_images)  # not against the low-pass images that prefixes should look like
    assert against_images[-1] == pytest.approx(metrics["rate"]["psnr_mean_of_images"])
    assert found["planes"][0]["share"] > found["planes"][1]["share"] > 0
    assert all("prior_bits" in entry and entry["prior_bits"] for entry in streams["prefixes"])
    assert streams["prior_bits"] == pytest.approx(
        sum(scale["prior"] for scale in streams["scales"]) + streams["header_bits"]
    )
    assert metrics["rate"]["prior_bits_per_pixel"] == pytest.approx(streams["prior_bits"] / 256)
    assert set(metrics["upsampling"]["rows"]) >= {"upsampled", "bicubic", "bound"}
    assert (folder / "upsampling.png").exists() and (folder / "growing.png").exists()
    assert "Lists of" in (folder / "report.html").read_text()


def test_colouring(lists, luma, gray, tmp_path, capsys):
    out = tmp_path / "out"
    assert luma("colorize", f"input={gray}", "count=2", f"out={out}", "seed=5", "sampling.temperature=[0.5]") == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0-000005.png", "0-000006.png", "1-000007.png", "1-000008.png", "sheet.png"]
    pictures = {name: np.array(Image.open(out / name)).astype(int) for name in names}
    for name in names[:-1]:
        given = np.array(Image.open(gray / f"{name[0]}.png")).astype(int)
        found = np.array(Image.open(out / name).convert("L")).astype(int)
        inside = ((pictures[name] > 0) & (pictures[name] < 255)).all(-1)  # elsewhere the colour was cut off
        assert inside.any() and abs(found - given)[inside].max() <= 2
    assert (pictures["0-000005.png"] != pictures["0-000006.png"]).any()
    again = tmp_path / "again"
    assert (
        luma("colorize", f"input={gray}/1.png", "count=1", f"out={again}", "seed=7", "sampling.temperature=[0.5]") == 0
    )
    assert (np.array(Image.open(again / "1-000007.png")) == pictures["1-000007.png"]).all()


def test_colouring_is_evaluated(lists, luma):
    assert luma("eval", "eval.num_colorized=6", "eval.name=colour", "sampling.temperature=[0.5]") == 0
    folder = lists / "run/eval/colour"
    found = json.loads((folder / "metrics.json").read_text())["colouring"]
    rows = found["rows"]
    assert rows["original"]["chroma_error"] == 0 and rows["gray"]["saturation"] < 1
    assert rows["bound"]["chroma_error"] < 0.5 * min(rows[name]["chroma_error"] for name in ("mean_chroma", "gray"))
    assert rows["mean_chroma"]["chroma_spread"] < 1 < rows["original"]["chroma_spread"]
    prefixes = json.loads((folder / "metrics.json").read_text())["streams"]["prefixes"]
    assert [entry["prior_bits"] is None for entry in prefixes] == [True] * 5 + [False]
    assert not (folder / "finished.png").exists()
    assert (folder / "colouring.png").exists() and "Colouring" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("command", "items", "message"),
    [
        ("colorize", ("input={gray}",), "prior.order=natural; train one with prior.order=luma_first"),
        ("eval", ("eval.num_colorized=2",), "with prior.order=natural: colorization"),
        ("edit", ("input={image}", "frozen=9"), "frozen=9; allowed: 1 to 5 of the 6 scales"),
        ("upsample", ("input={image}", "to=8"), "the result would not be larger"),
        ("sample", ("eval.num_colorized=-1",), "eval.num_colorized=-1; allowed: 0, or 2 or more"),
        ("sample", ("prior.value_depth=0",), "prior.value_depth=0; allowed: 1 or more"),
        ("sample", ("prior.early_bias=nan",), "prior.early_bias=nan; allowed: 0 or more"),
        ("sample", ("sampling.compile=true",), "it cannot be compiled"),
        ("eval", ("eval.edit_frozen=[1]",), "the scales of these tokens have no image of their own"),
        ("sample", ("prior.patch=3",), "prior.patch=3 with tokenizer.chroma=4:2:0"),
        ("eval", ("prior.order=luma_first", "eval.upsample_from=8"), "with prior.order=luma_first: upsampling needs"),
        ("sample", ("sampling.top_k=[1,2]",), "allowed: 1 for streams"),
    ],
)
def test_what_lists_cannot_do_is_named(lists, gray, image_folder, tmp_path, capsys, command, items, message):
    names = {"gray": gray, "image": image_folder / "green/000.png", "tmp": tmp_path}
    assert made_with(lists)(command, *(item.format(**names) for item in items)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("input={image}",), "is in color; give a gray image, or color=drop"),
        (("input={gray}", "color=keep"), "color=keep; allowed: refuse, drop"),
        ((), "input= is missing"),
        (("input={gray}", "classes=teal"), "classes=teal; allowed:"),
        (("input={gray}", "count=0"), "count=0; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_coloured_is_named(luma, gray, image_folder, tmp_path, capsys, items, message):
    names = {"gray": gray, "image": image_folder / "green/000.png"}
    assert luma("colorize", f"out={tmp_path}/out", *(item.format(**names) for item in items)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_colour_may_be_dropped_on_request(luma, image_folder, tmp_path):
    items = (f"input={image_folder}/red/000.png", "color=drop", "count=1", f"out={tmp_path}/out")
    assert luma("colorize", *items, "sampling.temperature=[0.5]") == 0
    found = Image.open(tmp_path / "out/000-000000.png").convert("L")
    wanted = Image.open(image_folder / "red/000.png").convert("L")
    assert abs(np.array(found).astype(int) - np.array(wanted)).mean() < 12  # some colours do not exist at that luma


def test_other_tokenizers_cannot_colour(finished, gray, capsys):
    assert main(["colorize", str(finished / "tiny.yaml"), f"run={finished}/run", f"input={gray}"]) == 2
    assert "colorization needs separate tokens for luma and chroma" in capsys.readouterr().err


def test_given_scales_are_whole_in_what_eval_finishes(lists, monkeypatch):
    """What is shown as given is all that the finished images have of those scales."""
    config = load_config(lists / "tiny.yaml", [f"run={lists}/run", *LISTS])
    models, asked = load_models(config), []
    monkeypatch.setattr(Models, "draw", lambda self, *a, **k: asked.append(k["whole"]) or a[3])
    val = Images(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1]), [0, 1], ["", ""])
    show_finished(config, lists, models, val, models.encode(val.pixels))
    assert [list(each) for each in asked] == [[0, 1, 2, 3]] * 3 + [[0, 1, 2, 3, 4]] * 3


def test_memory_is_measured_by_bench(lists, capsys):
    call = made_with(lists)
    out = lists / "bench.json"
    assert call("bench", "parts=tokenizer", "memory=16,32", "repeats=1", f"out={out}", "prior.chunk=20") == 0
    found = json.loads(out.read_text())["memory"]
    assert [entry["side"] for entry in found] == [16, 32]
    for entry in found:
        for kind in ("by_chunks", "whole"):
            assert entry[kind]["total"] == sum(entry[kind][part] for part in ("decoders", "encoder", "rest"))
        assert entry["whole"]["decoders"] > entry["by_chunks"]["decoders"]
    out.unlink()
    for wrong, message in (
        (("memory=16,x",), "memory=16,x; allowed: comma-separated numbers"),
        (("memory=0",), "memory=0; allowed: sides of 1 px or more"),
        (("memory=16", "prior.chunk=5000"), "less than prior.chunk=5000"),
    ):
        assert call("bench", "parts=tokenizer", "repeats=1", f"out={out}", *wrong) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_the_prior_resumes_exactly(lists, tmp_path):
    """Which chunk is drawn depends on the step alone: stopped after two of four steps, the weights are the same."""
    call, settings = made_with(lists), ("prior_training.checkpoint_every=2", "prior_training.max_steps=4")
    weights = []
    for name in ("whole", "halves"):
        path = tmp_path / name / "prior.safetensors"
        if name == "halves":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("stages.prior.module.PriorModule.on_train_batch_end", stop_after_two, raising=False)
                with pytest.raises(SystemExit):
                    call("train-prior", f"prior.path={path}", *settings)
        assert call("train-prior", f"prior.path={path}", *settings) == 0
        weights.append(load_prior(path)[0].state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_upsampling_and_editing_of_lists(lists, image_folder, tmp_path):
    call, source = made_with(lists), Image.open(image_folder / "red/003.png")
    source.resize((8, 8), Image.Resampling.BOX).save(tmp_path / "small.png")
    settings = ("sampling.temperature=[0.5]", "count=2")
    assert call("upsample", f"input={tmp_path}/small.png", f"out={tmp_path}/up", *settings) == 0
    assert Image.open(tmp_path / "up/small-000000.png").size == (16, 16)
    assert call("edit", f"input={image_folder}/red/003.png", "frozen=4", f"out={tmp_path}/edit", *settings) == 0
    tokenizer, _ = load_tokenizer(lists / "run/tokenizer/tokenizer.safetensors")
    assert tokenizer.layout.keeps_prefixes and not tokenizer.layout.encodes_prefixes


def test_the_prior_keeps_its_order(lists):
    natural, _ = load_prior(lists / "run/prior/prior.safetensors")
    other, metadata = load_prior(lists / "luma/prior.safetensors")
    assert natural.order == "natural" and other.order == "luma_first" and metadata["config"]["order"] == "luma_first"
    assert natural.layout == other.layout


def test_two_processes_train_one_prior(lists, tmp_path):
    """Plain DDP: every step uses every weight, whatever chunks the ranks draw, and the ranks end with one result."""
    path = tmp_path / "prior.safetensors"
    command = ["train-prior", lists / "tiny.yaml", f"run={lists}/run", *LISTS]
    ended = two(tmp_path, *command, f"prior.path={path}", "prior_training.precision=bf16")
    assert [rank.code for rank in ended] == [0, 0], ended
    prior, metadata = load_prior(path)
    assert metadata["world_size"] == 2 and metadata["steps"] == 6
    assert all(bool(value.isfinite().all()) for value in prior.state_dict().values())
