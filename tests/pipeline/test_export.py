"""octaves export: what it writes is the run, bit for bit; the card tells the truth; nothing else is overwritten."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import octaves
from data.files import file_sha256
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.models import load_models
from pipeline.pretrained import load_pretrained
from stages.weights import load_tokenizer
from tests.pipeline.untrained import KINDS, write_run


def export(given, *keys):
    return main(["export", *given, *keys])


def noise(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_run_bit_for_bit(kind, tmp_path, image_folder):
    given = write_run(tmp_path, image_folder, kind)
    sampling = ["sampling.temperature=[0.7]", "sampling.guidance=1.5"]
    assert export(given, *sampling) == 0
    shutil.move(tmp_path / "run/export", tmp_path / "elsewhere")
    tokenizer, _ = load_tokenizer(tmp_path / "run/tokenizer/tokenizer.safetensors")
    assert main(["sample", *given, *sampling, "count=2", "seed=3", f"out={tmp_path}/out"]) == 0
    os.rename(tmp_path / "run", tmp_path / "away")  # nothing of the run is needed

    model = octaves.load(tmp_path / "elsewhere", device="cpu")
    tokens, expected = model.encode(noise()), tokenizer.encode(noise())
    assert torch.equal(tokens.ids, expected.ids) and torch.equal(tokens.lengths, expected.lengths)
    assert torch.equal(tokens.header, expected.header)
    assert torch.equal(model.decode(tokens), tokenizer.decode(expected))
    drawn = octaves.to_pil(model.sample(count=2, seed=3))
    names = sorted((tmp_path / "out").glob("*-*.png"))
    assert len(names) == 6 and model.class_names == ["blue", "green", "red"]
    for picture, name in zip(drawn, names, strict=True):
        assert picture.tobytes() == Image.open(name).tobytes()
    if model.tokenizer.renders:
        assert torch.equal(model.render(tokens, (20, 9)), tokenizer.render(expected, (20, 9)))


def test_captions_are_read_as_by_the_command(tmp_path, image_folder):
    given = write_run(tmp_path, image_folder, "sit-words")
    assert export(given) == 0
    keys = ["text=a leaf | the sky", "classes=red", "count=1", f"out={tmp_path}/out"]
    assert main(["sample", *given, *keys]) == 0
    model = octaves.load(tmp_path / "run/export", device="cpu")
    drawn = octaves.to_pil(model.sample(texts=["a leaf", "the sky"], classes=["red"]))
    for picture, name in zip(drawn, ("a_leaf__red-000000.png", "the_sky__red-000001.png"), strict=True):
        assert picture.tobytes() == Image.open(tmp_path / "out" / name).tobytes()
    assert drawn[0].tobytes() != octaves.to_pil(model.sample(texts=["the sky"], classes=["red"]))[0].tobytes()
    card = (tmp_path / "run/export/README.md").read_text()
    assert front_matter_of(card)["pipeline_tag"] == "text-to-image"
    assert "encoded by the text encoder `words`" in card and "Its classes: blue, green, red." in card


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """A copy of the finished run, evaluated and exported."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(finished / "run", folder / "run")
    given = [str(finished / "tiny.yaml"), f"run={folder}/run"]
    assert main(["eval", *given]) == 0
    assert export(given, "license=cc-by-4.0", "programs=true") == 0
    return folder, given


def front_matter_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_the_numbers_of_the_evaluation(evaluated):
    folder, _ = evaluated
    metrics = json.loads((folder / "run/eval/default/metrics.json").read_text())
    card = (folder / "run/export/README.md").read_text()
    matter = front_matter_of(card)
    assert matter["license"] == "cc-by-4.0" and matter["library_name"] == "octaves"
    assert matter["pipeline_tag"] == "unconditional-image-generation" and "sit" in matter["tags"]
    found = {
        (result["task"]["name"], figure["type"]): figure
        for result in matter["model-index"][0]["results"]
        for figure in result["metrics"]
    }
    tokenizer, samples, rate = metrics["tokenizer"], metrics["samples"], metrics["rate"]
    assert found["Reconstruction", "psnr"]["value"] == tokenizer["psnr_mean_of_images"]
    assert found["Reconstruction", "psnr"]["args"] == {"num_images": 8}
    assert found["Reconstruction", "ssim"]["value"] == tokenizer["ssim"]
    assert found["Reconstruction", "bits_per_pixel"]["value"] == rate["fixed_length_bits_per_pixel"]
    assert found["Generation", "prior_bits_per_pixel"]["value"] == rate["prior_bits_per_pixel"]
    assert found["Generation", "class_accuracy"]["value"] == samples["class_accuracy"]["balanced"]
    assert found["Generation", "memorised"]["value"] == samples["memorised_as_decoded"]["share"]
    if "fd_lite0" in samples:  # its weights are installed
        marks = found["Generation", "fd_lite0"]["args"]
        assert marks["too_few_images"] is True and marks["num_judged"] == 8
        assert "N = 8 < 2,048: biased" in card and "no FID" in card
    assert f"| PSNR of reconstructions | **{tokenizer['psnr_mean_of_images']:.2f} dB** |" in card
    assert f"**{rate['prior_bits_per_pixel']:.3f} bits/px**" in card
    assert "8 held-out images · 8 samples" in card
    for line in metrics["skipped"]:
        assert f"- {line}" in card


def test_the_card_names_every_file_with_its_hash(evaluated):
    folder = evaluated[0] / "run/export"
    card = (folder / "README.md").read_text()
    hashes = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", card, re.M))
    assert set(hashes) == {path.name for path in folder.iterdir()} - {"README.md"}
    assert hashes == {name: file_sha256(folder / name) for name in hashes}
    assert {"encoder.pt2", "decoder.pt2", "config.json", "prior.safetensors", "tokenizer.safetensors"} == set(hashes)


def test_no_file_names_a_folder_of_this_machine(evaluated, image_folder):
    for path in (evaluated[0] / "run/export").iterdir():
        for folder in (image_folder, evaluated[0], Path(octaves.__file__).parent):
            assert str(folder).encode() not in path.read_bytes(), path.name


def test_the_three_lines_of_the_card_run(evaluated, tmp_path, monkeypatch):
    folder = evaluated[0] / "run/export"
    shutil.copytree(folder, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert len(code.splitlines()) == 3
    exec(code, {})
    assert Image.open("sample.png").size == (16, 16)


def test_programs_in_the_folder_are_the_tokenizer(evaluated):
    folder = evaluated[0] / "run/export"
    model = octaves.load(folder, device="cpu")
    encode, decode = (torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    tokens = model.encode(noise(5))
    assert torch.equal(encode(noise(5)), tokens.ids) and torch.equal(decode(tokens.ids), model.decode(tokens))


def test_an_evaluation_of_other_weights_is_not_quoted(evaluated, finished, tmp_path, capsys):
    shutil.copytree(evaluated[0] / "run", tmp_path / "run")
    path = tmp_path / "run/eval/default/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["settings"]["prior"]["sha256"] = "0" * 64
    path.write_text(json.dumps(metrics))
    given = [str(finished / "tiny.yaml"), f"run={tmp_path}/run"]
    assert export(given) == 0
    assert "the evaluation 'default' is of other weights" in capsys.readouterr().out
    card = (tmp_path / "run/export/README.md").read_text()
    assert "Not evaluated: the evaluation 'default' is of other weights" in card and "model-index" not in card
    assert export(given, "eval.name=none") == 0
    assert "Not evaluated: this run has no evaluation 'none'" in (tmp_path / "run/export/README.md").read_text()
    path.write_text("{}")
    assert export(given) == 2
    assert "is damaged or not an evaluation" in capsys.readouterr().err


def test_a_tokenizer_alone_is_exported_and_loaded(tmp_path, image_folder, capsys):
    given = write_run(tmp_path, image_folder, "nested", with_prior=False)
    assert export(given) == 0
    assert "the tokenizer is exported alone" in capsys.readouterr().out
    folder = tmp_path / "run/export"
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "tokenizer.safetensors"}
    model = octaves.load(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    names = {"images": Image.new("RGB", (40, 30), "teal")}
    exec(code.replace('"."', repr(str(folder))), names)
    assert names["reconstructions"].shape == (1, 3, 16, 16)
    with pytest.raises(octaves.OctavesError, match="a tokenizer alone"):
        model.sample()


def test_an_export_is_replaced_and_nothing_else(tmp_path, image_folder, capsys):
    given = write_run(tmp_path, image_folder, "vit-vqgan")
    out = tmp_path / "run/export"
    assert export(given, "programs=true") == 0
    assert export(given, "license=mit") == 0
    assert not (out / "encoder.pt2").exists() and front_matter_of((out / "README.md").read_text())["license"] == "mit"
    (out / "notes.txt").write_text("mine")
    assert export(given) == 2 and "also contains notes.txt" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert export(given, f"out={tmp_path}/mine") == 0  # an empty folder may be taken
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    for place, words in (("other", "contains something other than an export"), ("vit-vqgan.yaml", "is a file")):
        before = snapshot(tmp_path / place)
        assert export(given, f"out={tmp_path}/{place}") == 2
        assert words in one_line(capsys) and snapshot(tmp_path / place) == before
    assert export(given, f"out={tmp_path}/vit-vqgan.yaml/below") == 2 and "is a file" in one_line(capsys)
    assert export(given, "out=/proc/export") == 2 and "cannot be written" in one_line(capsys)


def snapshot(path):
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file: file.read_bytes() for file in files}


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("octaves: ") and error.count("\n") == 1
    return error


def test_a_failed_export_leaves_the_old_one_and_no_traces(tmp_path, image_folder, capsys, monkeypatch):
    given = write_run(tmp_path, image_folder, "sit")
    assert export(given) == 0
    before = snapshot(tmp_path / "run/export")

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("pipeline.export.publish", broken)
    with pytest.raises(OSError):
        export(given, "license=mit")
    assert snapshot(tmp_path / "run/export") == before
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["export", "prior", "tokenizer"]


@pytest.mark.parametrize(
    "kind, keys, words",
    [
        ("bitplane", ["programs=true"], "has no network that could be exported"),
        ("sparse-dct", ["programs=true"], "has no network that could be exported"),
        ("sit", ["programs=yes"], "programs=yes; allowed: true or false"),
        ("sit", ["license=My own!"], "license=My own!; allowed: a name such as mit"),
        ("sit", ["sampling.scales=9"], "sampling.scales=9; allowed: 1 to 3"),
        ("sit", ["tokenizer.path={folder}/none"], "none is missing: no tokenizer yet"),
        ("sit", ["prior.path={folder}/run/tokenizer/tokenizer.safetensors"], "holds a tokenizer, not a prior"),
    ],
)
def test_wrong_input_is_answered_by_one_line(kind, keys, words, tmp_path, image_folder, capsys):
    given = write_run(tmp_path, image_folder, kind)
    assert export(given, *[key.format(folder=tmp_path) for key in keys]) == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "run/export").exists()


def test_a_prior_of_another_tokenizer_is_refused(tmp_path, image_folder, capsys):
    given = write_run(tmp_path, image_folder, "sit")
    write_run(tmp_path / "other", image_folder, "nested")
    shutil.copy(tmp_path / "other/run/prior/prior.safetensors", tmp_path / "run/prior/prior.safetensors")
    assert export(given) == 2 and "was trained on tokens of another tokenizer" in one_line(capsys)


def test_photos_are_named_with_their_licences(tmp_path, image_folder):
    """Counted out of the index that `octaves photos` writes."""
    given = write_run(tmp_path, image_folder, "sit")
    crops = tmp_path / "crops"
    crops.mkdir()
    pictures = {
        "train": {"a/1.jpg": {"crops": 3, "license": "CC0"}, "a/2.jpg": {"crops": 4, "license": "CC0"}},
        "val": {"a/3.jpg": {"crops": 5, "license": "CC0"}, "b/1.jpg": {"crops": 6, "license": "GPL | other"}},
    }
    (crops / "index.json").write_text(json.dumps({"pictures": pictures}))
    assert export(given, "images.kind=photos", f"images.path={crops}") == 0
    card = (tmp_path / "run/export/README.md").read_text()
    assert "| a | CC0 | 3 | 7 | 5 |" in card and "| b | GPL \\| other | 1 | 0 | 6 |" in card
    assert str(crops) not in card


def damage(folder, name, content=None):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"x" if content is None else content)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: damage(f, "tokenizer.safetensors"), "tokenizer.safetensors is not the file listed in config.json"),
        (lambda f: damage(f, "prior.safetensors", b"version https://git-lfs"), "git lfs pull"),
        (lambda f: (f / "prior.safetensors").unlink(), "prior.safetensors is missing"),
        (lambda f: damage(f, "config.json", b"{"), "missing or not valid JSON"),
        (lambda f: damage(f, "config.json", b"[]"), "format None, expected 'octaves-export/1'"),
        (lambda f: damage(f, "config.json", b'{"format": "octaves-export/1"}'), "lists no files"),
        (lambda f: damage(f, "config.json", b'{"model_type": "bert"}'), "was not written by `octaves export`"),
        (lambda f: (f / "config.json").unlink(), "is neither an export (it has no config.json) nor a run"),
        (lambda f: shutil.rmtree(f), "no such file or folder"),
    ],
)
def test_a_damaged_or_foreign_folder_is_answered_by_one_line(change, words, evaluated, tmp_path):
    shutil.copytree(evaluated[0] / "run/export", tmp_path / "export")
    change(tmp_path / "export")
    with pytest.raises(octaves.OctavesError, match=re.escape(words)) as caught:
        octaves.load(tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_a_run_a_file_and_an_export_give_the_same_tokens(evaluated):
    folder, given = evaluated
    of_run = load_models(load_config(given[0], given[1:]))
    paths = ("run", "run/export", "run/tokenizer/tokenizer.safetensors")
    for path in paths:
        loaded = load_pretrained(folder / path)
        assert torch.equal(loaded.tokenizer.encode(noise()).ids, of_run.tokenizer.encode(noise()).ids)
        assert (loaded.prior is None) == path.endswith("safetensors")
    with pytest.raises(octaves.OctavesError, match="holds a prior, not a tokenizer"):
        octaves.load(folder / "run/prior/prior.safetensors")
