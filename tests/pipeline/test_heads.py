"""A head on a finished tokenizer, whose tokens stay; and octaves reconstruct, at its own size and any other."""

import json

import pytest
import torch
from PIL import Image

from data.files import file_sha256
from pipeline.__main__ import main
from stages.weights import load_tokenizer, read_weights

HEAD = [
    "tokenizer.head.kind=wavelet",
    "tokenizer.head.width=8",
    "tokenizer_training.adversarial_weight=0",
    "tokenizer_training.oversampling=2",
]


@pytest.fixture(scope="module")
def headed(finished, tmp_path_factory):
    """A run whose tokenizer is that of ``finished`` with a head, and the YAML."""
    folder = tmp_path_factory.mktemp("headed")
    start = finished / "run" / "tokenizer" / "tokenizer.safetensors"
    photos = f"images.path={make_photos(folder, 48)}"
    keys = [f"run={folder}/run", f"tokenizer_training.start_from={start}", photos, *HEAD]
    assert main(["train-tokenizer", str(finished / "tiny.yaml"), *keys]) == 0
    photo = Image.radial_gradient("L").convert("RGB").resize((40, 24))
    photo.save(folder / "photo.png")
    return folder


def reconstruct(finished, headed, *keys):
    given = [f"run={headed}/run", f"out={headed}/out", f"input={headed}/photo.png", *keys]
    return main(["reconstruct", str(finished / "tiny.yaml"), *given])


def test_the_head_is_trained_and_nothing_else(finished, headed):
    before = read_weights(finished / "run" / "tokenizer" / "tokenizer.safetensors")[1]
    tokenizer, metadata = load_tokenizer(headed / "run" / "tokenizer" / "tokenizer.safetensors")
    after = tokenizer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after if name not in before} == {"head"}
    assert metadata["config"]["head"]["kind"] == "wavelet" and metadata["steps"] == 6
    fresh = torch.full_like(after["head.square"], 0.1)
    assert not torch.equal(after["head.square"], fresh)


def test_prior_and_cache_of_the_same_tokens_still_belong(finished, headed):
    run = finished / "run"
    keys = [f"run={headed}/run", f"prior.path={run}/prior/prior.safetensors", f"tokens.path={run}/tokens"]
    assert main(["sample", str(finished / "tiny.yaml"), *keys, "count=1", f"out={headed}/samples"]) == 0
    keys[1] = f"prior.path={headed}/prior/prior.safetensors"
    assert main(["train-prior", str(finished / "tiny.yaml"), *keys]) == 0
    metadata = load_tokenizer(headed / "run" / "tokenizer" / "tokenizer.safetensors")[1]
    assert metadata["tokens_of"] == file_sha256(run / "tokenizer" / "tokenizer.safetensors")


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        ([], (16, 16)),
        (["crop=2,3,5,7"], (7, 5)),
        (["size=30x51"], (51, 30)),
        (["size=20"], (20, 20)),
        (["size=30x51", "crop=20,40,10,11"], (11, 10)),
        (["size=1x1"], (1, 1)),
    ],
)
def test_any_size_and_part(finished, headed, keys, size):
    assert reconstruct(finished, headed, *keys) == 0
    assert Image.open(headed / "out" / "photo.png").size == size


def test_a_whole_folder_and_gray_pictures(finished, headed, tmp_path):
    (tmp_path / "in").mkdir()
    for name, mode in (("gray", "L"), ("clear", "RGBA"), ("deep", "I;16")):
        Image.new(mode, (9, 33)).save(tmp_path / "in" / f"{name}.png")
    assert reconstruct(finished, headed, f"input={tmp_path}/in", "size=10x12", f"out={tmp_path}/out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clear.png", "deep.png", "gray.png"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["size=big"], "size=big; allowed: height x width"),
        (["size=0x4"], "size=0x4; allowed: 1 to 16384"),
        (["size=20000"], "size=20000x20000; allowed: 1 to 16384"),
        (["crop=1,2,3"], "crop=1,2,3; allowed: four numbers"),
        (["crop=a,2,3,4"], "crop=a,2,3,4; allowed: comma-separated numbers"),
        (["size=30x30", "crop=0,0,31,1"], "lies outside of 30x30"),
        (["crop=10,10,7,1"], "lies outside of 16x16"),
        (["input="], "input= is missing"),
        (["input=nothing.png"], "no such image or folder"),
    ],
)
def test_bad_requests_leave_nothing(finished, headed, tmp_path, capsys, keys, message):
    assert reconstruct(finished, headed, *keys, f"out={tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_size_without_a_head_is_refused_before_anything_is_written(finished, headed, tmp_path, capsys):
    keys = [f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors", f"out={tmp_path}/out"]
    assert reconstruct(finished, headed, *keys, "size=30x30") == 2
    assert "train one with tokenizer.head.kind=wavelet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert reconstruct(finished, headed, *keys) == 0
    assert reconstruct(finished, headed, keys[0], f"out={tmp_path}/out/photo.png") == 2
    assert "photo.png is a file; give a folder" in capsys.readouterr().err


def test_a_start_of_another_config_is_refused(finished, tmp_path, capsys):
    start = finished / "run" / "tokenizer" / "tokenizer.safetensors"
    keys = [f"run={tmp_path}/run", f"tokenizer_training.start_from={start}", *HEAD]
    # all of these have weights of the same shapes
    for other, named in (("attention=sit", "attention is sit-sc, here sit"), ("encoder.heads=2", "encoder is")):
        assert main(["train-tokenizer", str(finished / "tiny.yaml"), *keys, f"tokenizer.{other}"]) == 2
        assert f"is another tokenizer: its {named}" in capsys.readouterr().err
    assert main(["train-tokenizer", str(finished / "tiny.yaml"), *keys]) == 2
    assert "smaller than images.size times tokenizer_training.oversampling, 32 px" in capsys.readouterr().err
    keys[1] = "tokenizer_training.start_from=nowhere"
    assert main(["train-tokenizer", str(finished / "tiny.yaml"), *keys]) == 2
    assert "nowhere: no such file" in capsys.readouterr().err


def test_eval_compares_it_with_larger_photos_and_leaves_out_what_is_not_that_large(finished, headed):
    keys = [
        f"run={headed}/run",
        "prior.path=none",
        "eval.head_sizes=[1.5,2.7]",
        "eval.num_head=6",
        "images.val_share=0.4",
        *HEAD,
    ]
    for name, path, count in (("large", make_photos(headed, 48), 6), ("small", make_photos(headed, 20), 0)):
        more = [f"images.path={path}", f"eval.name={name}"]
        assert main(["eval", str(finished / "tiny.yaml"), *keys, *more]) == 0
        folder = headed / "run" / "eval" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        found = metrics.get("head")
        assert (folder / "head.png").exists() == bool(count) and (found is not None) == bool(count)
        assert any("is stored that large" in line for line in metrics["skipped"]) == (not count)
        assert ("Any size" in (folder / "report.html").read_text()) == bool(count)
        if count:
            assert found["num_images"] == count
            assert [entry["image_size"][0] for entry in found["sizes"]] == [16, 24, 43]
            own, *larger = found["sizes"]
            assert own["head_against_decoded"] > 0 and "decoded" in own
            assert all(entry["bicubic_of_decoded"]["psnr_mean_of_images"] > 0 for entry in larger)


def make_photos(folder, side):
    """20 pictures of that side in two classes."""
    for index in range(20):
        place = folder / f"photos{side}" / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").rotate(index * 10).convert("RGB").resize((side, side)).save(place / f"{index}.png")
    return folder / f"photos{side}"
