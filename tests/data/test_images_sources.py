"""Image sources: files and classes, the train and validation splits, and the errors for missing data."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import shards
from data.images.config import ImagesConfig
from data.images.reading import pixels_of
from data.images.source import CorruptImage, ImagesError, ImageSource, PackedStrings, hashed_order
from data.images.sources import open_source


@pytest.fixture(autouse=True)
def own_data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Stored shard indexes belong to one test; the Fashion-MNIST files are in the user's own folder."""
    if "fashion" not in request.keywords:
        monkeypatch.setenv("OCTAVES_DATA", str(tmp_path / "home"))


def encoded(value: int, ending: str = "png") -> bytes:
    """A 4 x 4 picture of one gray value."""
    stored = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(stored, "jpeg" if ending == "jpg" else ending, lossless=True)
    return stored.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_files(folder: Path, names: str) -> None:
    for number, name in enumerate(names.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))


def keys(source: ImageSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def folder_config(path: Path, **options: object) -> ImagesConfig:
    return ImagesConfig(kind="folder", path=str(path), size=4, **options)  # type: ignore[arg-type]


def test_packed_strings_are_the_strings() -> None:
    strings = ["", "ä/b", "\udce4.png", "c" * 99]
    packed = PackedStrings(strings)
    assert list(packed) == strings and packed[1:3] == strings[1:3] and len(packed) == 4
    assert list(PackedStrings(packed=packed.arrays)) == strings


def test_a_new_image_leaves_the_order_of_the_others() -> None:
    names = [f"{number}.png" for number in range(50)]
    before = [names[index] for index in hashed_order(names, 3)]
    after = [["new.png", *names][index] for index in hashed_order(["new.png", *names], 3)]
    assert [name for name in after if name != "new.png"] == before


def test_folders_are_classes_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path / "train", "cat/b.PNG cat/deep/a.jpg dog/a.webp loose.png notes/readme.txt cat/.hidden.png")
    write_files(tmp_path / "val", "dog/z.png")
    train = open_source(folder_config(tmp_path), "train")
    assert train.class_names == ("cat", "dog")
    assert keys(train) == ["cat/b.PNG", "cat/deep/a.jpg", "dog/a.webp", "loose.png"]
    assert [train[index].label for index in range(4)] == [0, 0, 1, -1]
    assert train[0].text == ""
    val = open_source(folder_config(tmp_path), "val")
    assert val.class_names == train.class_names and val[0].label == 1
    beside = open_source(folder_config(tmp_path / "train"), "val")
    assert keys(beside) == keys(val)


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write_files(tmp_path, " ".join(f"{number}.png" for number in range(10)))
    train, val = (open_source(folder_config(tmp_path, val_share=0.3), split) for split in ("train", "val"))
    assert train.class_names == () and train[0].label == -1
    assert len(val) == 3 and sorted(keys(train) + keys(val)) == sorted(f"{number}.png" for number in range(10))


def test_seeded_split_is_fixed_and_has_two_sides(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png b.png c.png d.png")
    sides = {seed: keys(open_source(folder_config(tmp_path, split_seed=seed), "val")) for seed in range(20)}
    assert all(len(side) == 1 for side in sides.values()) and len({side[0] for side in sides.values()}) > 1
    assert keys(open_source(folder_config(tmp_path, split_seed=7), "val")) == sides[7]
    for name in "bcd":
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ImagesError, match="val_path"):
        open_source(folder_config(tmp_path), "train")


def test_a_class_that_was_never_trained_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a/0.png val/b/0.png")
    with pytest.raises(ImagesError, match="classes b"):
        open_source(folder_config(tmp_path), "val")


def test_missing_and_empty_folders_say_so(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="no such folder"):
        open_source(folder_config(tmp_path / "nowhere"), "train")
    write_files(tmp_path, "notes.txt")
    with pytest.raises(ImagesError, match=r"holds no images; accepted endings: \.jpg"):
        open_source(folder_config(tmp_path), "train")


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    write_files(tmp_path, "a.png b.png c.png")
    prints = [open_source(folder_config(tmp_path), "train").fingerprint()]
    prints.append(open_source(folder_config(tmp_path), "train").fingerprint())
    (tmp_path / "c.png").write_bytes(encoded(9) + b"more")
    prints.append(open_source(folder_config(tmp_path), "train").fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_truncated_and_foreign_files_are_corrupt(tmp_path: Path, ending: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for name in ("a", "b"):
        noise.save(tmp_path / f"{name}.{ending}")
    whole = (tmp_path / f"a.{ending}").read_bytes()
    (tmp_path / f"a.{ending}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"b.{ending}").write_text("no picture")
    source = open_source(folder_config(tmp_path, val_path=str(tmp_path)), "train")
    for index in range(2):
        with pytest.raises(CorruptImage, match=source.key(index)):
            source[index]


def test_shards_of_uneven_length_are_read_by_index(tmp_path: Path) -> None:
    tars = {
        "00.tar": {"x/a.b.png": b"", "x/c.png": encoded(1), "x/c.cls": b"2", "x/c.txt": b"one \n"},
        "01.tar": {"d.jpg": encoded(200, "jpg"), "d.json": b'{"label": 1, "caption": "two"}', "e.cls": b"0"},
        "02.tar": {},
        "03.tar": {f"{number}.webp": encoded(number, "webp") for number in range(5)},
    }
    for name, members in tars.items():
        write_tar(tmp_path / name, members)
    for pattern in (tmp_path, tmp_path / "{00..03}.tar", tmp_path / "0*.tar"):
        config = ImagesConfig(kind="webdataset", path=str(pattern), size=4, val_path=str(tmp_path / "01.tar"))
        source = open_source(config, "train")
        assert keys(source) == ["00/x/c", "01/d", *(f"03/{number}" for number in range(5))]
        read = [source[index] for index in range(len(source))]
        assert [sample.label for sample in read] == [2, 1, -1, -1, -1, -1, -1]
        assert [sample.text for sample in read[:3]] == ["one", "two", ""]
        assert source.class_names == ("0", "1", "2")
        assert pixels_of(source, [0, 6], config)[:, 0, 0, 0].tolist() == [1, 4]
        assert open_source(config, "val").class_names == source.class_names


def test_shards_keep_their_index_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0)})
    first = shards.ShardSource([tmp_path / "a.tar"])
    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan_shard", lambda path: pytest.fail("scanned again"))
        again = shards.ShardSource([tmp_path / "a.tar"])
    assert keys(again) == keys(first) and again.fingerprint() == first.fingerprint()
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "1.png": encoded(1)})
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    assert len(shards.ShardSource([tmp_path / "a.tar"])) == 2


def test_shards_travel_to_workers(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(50)})
    source = shards.ShardSource([tmp_path / "a.tar"])
    assert np.array_equal(np.asarray(source[0].image), np.asarray(pickle.loads(pickle.dumps(source))[0].image))


def test_class_names_beside_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "0.cls": b"1"})
    (tmp_path / "classes.txt").write_text("hat\nshoe\n")
    assert shards.ShardSource([tmp_path / "a.tar"]).class_names == ("hat", "shoe")
    (tmp_path / "classes.txt").write_text("hat\n")
    with pytest.raises(ImagesError, match="class 1 is beyond"):
        shards.ShardSource([tmp_path / "a.tar"])


def test_damaged_shards_say_so(tmp_path: Path) -> None:
    config = ImagesConfig(kind="webdataset", path=str(tmp_path))
    with pytest.raises(ImagesError, match="no shards at"):
        open_source(config, "train")
    write_tar(tmp_path / "a.tar", {"0.txt": b"no image"})
    with pytest.raises(ImagesError, match="no record with an image"):
        open_source(config, "train")
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "0.cls": b"cat"})
    with pytest.raises(ImagesError, match="no class number"):
        open_source(config, "train")
    write_tar(tmp_path / "a.tar", {f"{number}.png": bytes(2000) for number in range(9)})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:5000])
    with pytest.raises(ImagesError, match=r"a\.tar is no complete"):
        open_source(config, "train")


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "0.pyd": bomb, "0.pickle": bomb, "0.pth": bomb})
    shards.ShardSource([tmp_path / "a.tar"])[0]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("skin_tones", [False, True])
def test_no_held_out_icon_has_a_twin_in_training(skin_tones: bool) -> None:
    config = ImagesConfig(kind="demo", size=32, skin_tones=skin_tones)
    train, val = (open_source(config, split) for split in ("train", "val"))
    total = len(train) + len(val)
    assert total == (3773 if skin_tones else 1898) and abs(len(val) / total - config.val_share) < 0.01
    assert len(train.class_names) == 9
    assert {val[index].label for index in range(len(val))} == set(range(9))
    seen, unseen = (pixels_of(side, range(len(side)), config).flatten(1).double() / 255 for side in (train, val))
    assert torch.cdist(unseen, seen).square().min() / seen.shape[1] > 0.002


def test_demo_captions_name_what_is_seen() -> None:
    source = open_source(ImagesConfig(kind="demo", skin_tones=True), "train")
    texts = [source[index].text for index in range(0, len(source), 50)]
    assert all(text and text == text.lower() for text in texts)
    assert any("skin tone" in text for text in texts)


@pytest.mark.parametrize("kind", ["photos", "webdataset", "folder"])
def test_missing_sets_say_what_to_do(kind: str) -> None:
    with pytest.raises(ImagesError, match="octaves photos size=32|needs images.path"):
        open_source(ImagesConfig(kind=kind), "train")
    with pytest.raises(ImagesError, match="allowed: folder, webdataset, fashion, demo, photos"):
        open_source(ImagesConfig(kind="cifar"), "train")


def test_missing_fashion_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="apt-get install dataset-fashion-mnist"):
        open_source(ImagesConfig(kind="fashion", path=str(tmp_path)), "train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ImagesError, match="damaged"):
        open_source(ImagesConfig(kind="fashion", path=str(tmp_path)), "train")


@pytest.mark.fashion
def test_fashion_has_its_known_numbers() -> None:
    config = ImagesConfig(kind="fashion", size=32, channels=1, eval_view="pad")
    train, val = (open_source(config, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (60_000, 10_000)
    assert np.bincount([val[index].label for index in range(len(val))]).tolist() == [1000] * 10
    pixels = pixels_of(val, [0], config)
    assert val[0].text == val.class_names[val[0].label] == "Ankle boot"
    assert np.array_equal(pixels[0, 0, 2:-2, 2:-2].numpy(), val[0].image) and pixels[0, 0, :2].sum() == 0
