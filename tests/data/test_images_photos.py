"""Photo crops: split by picture, reproducible, and read back as images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images.config import ImagesConfig
from data.images.reading import pixels_of
from data.images.sources import open_source
from pipeline import photos
from pipeline.photo_packages import Package
from pipeline.photos import PhotosConfig, PhotosError, choose_crops, gather_photos, run_photos


@pytest.fixture(autouse=True)
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One package with six pictures and one package that is not available."""
    monkeypatch.setenv("OCTAVES_DATA", str(tmp_path / "home"))
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        noise = generator.integers(0, 256, (70, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.png")
    packages = (
        Package("found", "CC0", ("*.png",), "found"),
        Package("lost", "CC0", ("*.png",), "lost"),
    )
    monkeypatch.setattr(photos, "PACKAGES", packages)
    monkeypatch.setattr(
        photos, "package_root", lambda package: tmp_path / "pictures" if package.name == "found" else None
    )


def test_pictures_are_on_one_side_and_crops_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_photos(["size=16", "reduce=2"])
    out = tmp_path / "home" / "photos16"
    printed = capsys.readouterr().out
    assert "continuing without lost" in printed and "pip install lost" in printed and str(out) in printed
    index = json.loads((out / "index.json").read_text())
    assert not set(index["pictures"]["train"]) & set(index["pictures"]["val"])
    assert index["pictures"]["train"] | index["pictures"]["val"] == {
        f"found/{number}.png": {"crops": 6, "license": "CC0"} for number in range(6)
    }
    config = ImagesConfig(kind="photos", size=16)
    sides = {split: open_source(config, split) for split in ("train", "val")}  # type: ignore[arg-type]
    assert {split: len(source) for split, source in sides.items()} == index["counts"] == {"train": 30, "val": 6}
    held_out = next(iter(index["pictures"]["val"])).removeprefix("found/")
    with Image.open(tmp_path / "pictures" / held_out) as picture:
        whole = np.asarray(picture.reduce(2))
    expected = {whole[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16, 32)}
    crops = pixels_of(sides["val"], range(6), config).permute(0, 2, 3, 1).contiguous().numpy()
    assert {crop.tobytes() for crop in crops} == expected


def test_equal_input_gives_equal_bytes_and_finished_work_stays(tmp_path: Path) -> None:
    first, second = (gather_photos(PhotosConfig(size=16, out=str(tmp_path / name))) for name in ("a", "b"))
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert len(files) == 3 and all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    times = [(first / name).stat().st_mtime_ns for name in files]
    gather_photos(PhotosConfig(size=16, out=str(first)))
    assert times == [(first / name).stat().st_mtime_ns for name in files]
    with pytest.raises(PhotosError, match="other settings"):
        gather_photos(PhotosConfig(size=16, reduce=1, out=str(first)))


def test_flat_crops_do_not_outweigh_the_others() -> None:
    picture = np.full((64, 64, 3), 90, dtype=np.uint8)
    picture[:16] = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8)
    crops = choose_crops(Image.fromarray(picture), 16, flat_share=0.5)
    assert len(crops) == 8 and sum(top == 0 for _, top in crops) == 4
    assert choose_crops(Image.fromarray(picture), 16, flat_share=0.0) == [(left, 0) for left in (0, 16, 32, 48)]
    assert choose_crops(Image.fromarray(picture), 80, flat_share=0.5) == []


def test_pictures_of_one_scene_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shoots = Package("found", "CC0", ("*.png",), "found", scene=r"(.)\d\.png$", drawings=("c1.png",))
    for number, name in enumerate(("a0", "a1", "b0", "b1", "c0", "c1")):
        (tmp_path / "pictures" / f"{number}.png").rename(tmp_path / "pictures" / f"{name}.png")
    monkeypatch.setattr(photos, "PACKAGES", (shoots,))
    for seed in range(4):
        out = gather_photos(PhotosConfig(size=16, val_share=0.5, split_seed=seed, out=str(tmp_path / str(seed))))
        sides = json.loads((out / "index.json").read_text())["pictures"]
        shown = {side: {name.removeprefix("found/")[0] for name in names} for side, names in sides.items()}
        assert not shown["train"] & shown["val"] and len(sides["train"]) + len(sides["val"]) == 5


def test_debian_archives_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "debs").mkdir()
    monkeypatch.setattr(photos, "PACKAGES", (*photos.PACKAGES, Package("wallpapers", "GPL-2+", ("*.jpg",))))
    gather_photos(PhotosConfig(size=16, debs=str(tmp_path / "debs"), out=str(tmp_path / "out")))


@pytest.mark.parametrize("wrong", ["size=1", "reduce=0", "val_share=1.0", "colour=2", "size=many"])
def test_wrong_settings_are_one_line(wrong: str) -> None:
    with pytest.raises(PhotosError, match=wrong.split("=")[0] + "|many") as caught:
        run_photos([wrong])
    assert "\n" not in str(caught.value)


def test_no_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "PACKAGES", photos.PACKAGES[1:])
    with pytest.raises(PhotosError, match="make photos"):
        gather_photos(PhotosConfig(size=16))
