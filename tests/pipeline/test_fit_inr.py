"""fit-inr as a user calls it: what is written, and one line for every wrong input."""

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.fit_inr import read_image
from stages.inr.variants import VARIANTS

TOY = ("steps=3", "size=12", "hidden=8", "layers=1", "log_every=2")


@pytest.fixture
def photo(tmp_path):
    """A picture of 24 x 16 px with colours that change."""
    y, x = np.mgrid[:16, :24]
    pixels = np.stack((10 * x, 15 * y, 128 + 0 * x), axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_all_variants_of_two_images_are_written_and_told(photo, tmp_path, capsys):
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg")
    out = tmp_path / "deep/out"
    assert main(["fit-inr", str(photo), str(tmp_path / "turned.jpg"), *TOY, f"out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["fit.json", "photo.png", "psnr.png", "turned.png"]
    found = json.loads((out / "fit.json").read_text())
    assert found["settings"]["steps"] == 3 and found["settings"]["variants"] == list(VARIANTS)
    assert {name: image["size"] for name, image in found["images"].items()} == {"photo": [8, 12], "turned": [12, 8]}
    printed = capsys.readouterr().out
    for image in found["images"].values():
        assert list(image["variants"]) == list(VARIANTS)
        for name, fit in image["variants"].items():
            assert fit["steps"] == [0, 2, 3] and len(fit["psnr"]) == 3 and fit["diverged"] is None
            assert fit["final_psnr"] == fit["psnr"][-1] and fit["best_psnr"] == max(fit["psnr"])
            assert fit["seconds"] > 0 and fit["seconds_per_step"] == pytest.approx(fit["seconds"] / 3)
            assert f"{name} " in printed and f"{fit['parameters']:,d}" in printed
    width, height = Image.open(out / "photo.png").size
    assert width > 7 * 96 and height > 2 * 64


def test_the_same_seed_gives_the_same_numbers_whichever_variants_run(photo, tmp_path):
    for out, variants in (("a", "siren,split-singular"), ("b", "split-singular")):
        assert main(["fit-inr", str(photo), *TOY, f"variants={variants}", f"out={tmp_path}/{out}"]) == 0
    curves = [
        json.loads((tmp_path / out / "fit.json").read_text())["images"]["photo"]["variants"]["split-singular"]["psnr"]
        for out in "ab"
    ]
    assert curves[0] == curves[1]


def test_a_variant_that_diverges_is_told_and_the_others_go_on(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(VARIANTS, "wire", VARIANTS["wire"].__class__(VARIANTS["wire"].build, 1e30))
    assert main(["fit-inr", str(photo), *TOY, "variants=wire,siren", f"out={tmp_path}/out"]) == 0
    assert "diverged: no finite number after" in capsys.readouterr().out
    fits = json.loads((tmp_path / "out/fit.json").read_text())["images"]["photo"]["variants"]
    assert fits["wire"]["diverged"] >= 1 and fits["wire"]["final_psnr"] is None and fits["wire"]["best_psnr"] > 0
    assert fits["siren"]["diverged"] is None and fits["siren"]["steps"] == [0, 2, 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1", "CMYK"])
def test_every_kind_of_image_is_read(tmp_path, mode):
    grey = np.linspace(0, 255, 20 * 10).reshape(10, 20)
    if mode == "I;16":
        Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "image.tif")
    else:
        Image.fromarray(grey.astype(np.uint8)).convert(mode).save(tmp_path / "image.tif")
    found = read_image(tmp_path / "image.tif", 0)
    assert found.shape == (3, 10, 20) and found.float().mean() == pytest.approx(127.5, abs=5)
    assert read_image(tmp_path / "image.tif", 8).shape == (3, 4, 8)
    assert read_image(tmp_path / "image.tif", 100).shape == (3, 10, 20)


def test_images_are_upright_over_white_and_reduced_without_aliases(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera on its side
    Image.new("RGB", (20, 10)).save(tmp_path / "side.jpg", exif=exif)
    assert read_image(tmp_path / "side.jpg", 0).shape == (3, 20, 10)
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 0) == 255).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert read_image(tmp_path / "stripes.png", 8)[:, 1:-1, 1:-1].float().std() < 5


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "fit-inr needs an image: octaves fit-inr image.png"),
        (("steps=3",), "fit-inr needs an image"),
        (("{folder}/none.png",), "none.png: no such image"),
        (("{folder}",), "is a folder; allowed: image files"),
        (("{folder}/text.png",), "text.png: UnidentifiedImageError"),
        (("{photo}", "{photo}"), "would have the same name; rename the image"),
        (("{folder}/psnr.png",), "psnr.png and the plot psnr.png would have the same name"),
        (("{photo}", "out={folder}"), "would overwrite the image"),
        (("{photo}", "out={photo}"), "give a folder that can be created"),
        (("{photo}", "variants=siren,mlp"), "variants=mlp; allowed: all, fourier-relu, siren, wire-real, wire, split"),
        (("{photo}", "variants="), "variants=; allowed: all, fourier-relu"),
        (("{photo}", "steps=0"), "steps=0; allowed: 1 or more"),
        (("{photo}", "steps=many"), "steps=many; allowed: a whole number"),
        (("{photo}", "size=-1"), "size=-1; allowed: 0 for the image's own, or 2 pixels or more"),
        (("{photo}", "size=1"), "size=1; allowed: 0"),
        (("{photo}", "hidden=1"), "hidden=1; allowed: 2 or more"),
        (("{photo}", "layers=0"), "layers=0; allowed: 1 or more"),
        (("{photo}", "learning_rate=-1"), "learning_rate=-1.0; allowed: above 0"),
        (("{photo}", "learning_rate=nan"), "learning_rate=nan; allowed: above 0"),
        (("{photo}", "learning_rate=fast"), "learning_rate=fast; allowed: a number"),
        (("{photo}", "seed=-1"), "seed=-1; allowed: 0 to 2^63 - 1"),
        (("{photo}", "log_every=0"), "log_every=0; allowed: 1 or more"),
        (("{photo}", "stpes=3"), "no key 'stpes' (stpes=3); allowed: variants, steps, size"),
    ],
)
def test_wrong_input_is_one_line(photo, tmp_path, capsys, items, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "psnr.png").write_bytes(photo.read_bytes())
    given = [item.format(folder=tmp_path, photo=photo) for item in items]
    before = photo.read_bytes()
    if not any(item.startswith("out=") for item in given):
        given.append(f"out={tmp_path}/out")
    assert main(["fit-inr", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("octaves: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists() and photo.read_bytes() == before
