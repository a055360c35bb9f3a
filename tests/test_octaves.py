"""import octaves: what a stranger does with it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import octaves
from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.models import load_models
from tests.pipeline.untrained import write_run


@pytest.fixture(scope="module")
def model(finished):
    return octaves.load(finished / "run", device="cpu")


@pytest.fixture(scope="module")
def headed(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("headed")
    write_run(folder, image_folder, "sit-wavelet-head")
    return octaves.load(folder / "run", device="cpu")


def picture(width=16, height=16, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


README = (Path(octaves.__file__).parent / "README.md").read_text()
DOCUMENTED = [
    "\n".join(re.findall(r"^    (.*)$", octaves.__doc__, re.M)),
    *re.findall(r"```python\n(.*?)```", README, re.S),
]


@pytest.mark.parametrize("code", DOCUMENTED)
def test_the_lines_of_the_documentation_run(code, finished, tmp_path, monkeypatch):
    assert code.startswith("import octaves\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(finished / "run")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("sample.png").size == (16, 16)


def test_images_of_every_kind_are_the_same_image(model):
    image = picture()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = model.tokenizer.encode(tensor).ids
    for given in (image, [image], array, [array], array[None], (array,), tensor, tensor.double()):
        assert torch.equal(model.encode(given).ids, expected)
    assert torch.equal(model.encode([image, array]).ids, expected.repeat(2, 1, 1))


def test_pictures_of_other_sizes_are_cut_as_in_the_evaluation(model):
    wide = picture(40, 32)
    middle = wide.resize((16, 16), Image.Resampling.BICUBIC, box=(4, 0, 36, 32))
    assert torch.equal(model.encode(wide).ids, model.encode(middle).ids)
    assert torch.equal(model.encode(picture(mode="L")).ids, model.encode(picture(mode="L").convert("RGB")).ids)


def test_a_small_picture_gives_the_first_scales(model):
    """The encoder is scale-causal: a picture of half the side has the first scales of the whole one."""
    small = octaves.to_pil(model.decode(model.encode(picture())))[0].resize((8, 8), Image.Resampling.BOX)
    tokens = model.encode(small)
    assert tokens.ids.shape[1] == model.layout.prefix_length(2)
    assert model.decode(tokens).shape == (1, 3, 8, 8)


def test_pixels_come_back_in_range_and_as_the_same_picture(model):
    tokens = model.encode([picture()] * 3)
    pixels = model.decode(tokens)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 3, 16, 16) and pixels.abs().max() <= 1
    assert torch.equal(model.decode(octaves.Tokens.fixed(tokens.ids)), pixels)
    exact = torch.arange(256).repeat(3, 1).view(1, 3, 16, 16) / 127.5 - 1
    (back,) = octaves.to_pil(exact)
    assert np.array_equal(np.asarray(back)[..., 0].ravel(), np.arange(256))


def test_samples_are_those_of_the_command(finished, model, tmp_path):
    keys = [f"run={finished}/run", "classes=red,0", "count=2", "seed=5", "sampling.top_k=[3]", f"out={tmp_path}"]
    assert main(["sample", str(finished / "tiny.yaml"), *keys]) == 0
    drawn = octaves.to_pil(model.sample(classes=["red", 0], count=2, seed=5, top_k=3))
    for image, name in zip(drawn, ("red-000005", "red-000006", "blue-000007", "blue-000008"), strict=True):
        assert image.tobytes() == Image.open(tmp_path / f"{name}.png").tobytes()
    assert len(model.sample()) == 3  # every class
    assert model.sample(classes=[1], scales=2).shape == (1, 3, 8, 8)
    sharp = model.sample(classes=[1], count=4, temperature=[0.0, 0.0, 0.0])
    assert all(torch.allclose(one, sharp[0], atol=1e-5) for one in sharp)  # the most probable ids: no seed matters
    assert model.sampling.temperature == [1.0]  # a call changes nothing


def test_upsampling_is_that_of_the_command(finished, model, tmp_path):
    small = picture(8, 8)
    small.save(tmp_path / "small.png")
    keys = [f"run={finished}/run", f"input={tmp_path}/small.png", "classes=green", "count=1", f"out={tmp_path}/out"]
    assert main(["upsample", str(finished / "tiny.yaml"), *keys]) == 0
    (large,) = octaves.to_pil(model.upsample(small, classes=["green"]))
    assert large.tobytes() == Image.open(tmp_path / "out/small-green-000000.png").tobytes()
    with pytest.raises(octaves.OctavesError, match="2 classes and 1 texts for 1 images"):
        model.upsample(small, classes=["green", "red"])
    with pytest.raises(octaves.OctavesError, match="the image has 9 px; allowed: 4, 8, 16"):
        model.upsample(picture(9, 9))


def test_rendering_at_any_size(model, headed):
    tokens = headed.encode(picture())
    whole = headed.render(tokens, 24)
    assert whole.shape == (1, 3, 24, 24)
    torch.testing.assert_close(headed.render(tokens, (24, 24), (4, 8, 12, 10)), whole[..., 4:16, 8:18])
    with pytest.raises(octaves.OctavesError, match="decodes at its own size only"):
        model.render(model.encode(picture()), 24)


@pytest.mark.parametrize(
    "images, words",
    [
        ("photo.png", "str as an image; allowed: PIL images"),
        (None, "NoneType"),
        ([], "images of no pixels"),
        ([picture(), picture(8, 8)], "images of 16x16, 8x8 pixels; allowed: one or more, all of one size"),
        (np.zeros((16, 16, 3)), "an array of shape (16, 16, 3) and float64"),
        (np.zeros((16, 16, 2), np.uint8), "an array of shape (16, 16, 2)"),
        (torch.zeros(3, 16, 16), "allowed: float [B, 3, H, W] in [-1, 1]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "torch.uint8; allowed: float"),
        (torch.full((1, 3, 16, 16), 255.0), "values from 255 to 255; allowed: -1 to 1"),
        (torch.full((1, 3, 16, 16), float("nan")), "allowed: -1 to 1"),
        (torch.zeros(1, 3, 17, 17), "an image of 17x17; this tokenizer takes"),
    ],
)
def test_what_is_no_image_is_answered_by_one_line(model, images, words):
    with pytest.raises(octaves.OctavesError, match=re.escape(words)) as caught:
        model.encode(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"classes": ["purple"]}, "classes=purple; allowed: 0 to 2, or blue, green, red"),
        ({"classes": [-1]}, "classes=-1; allowed: 0 to 2"),
        ({"classes": "red"}, "classes='red'; allowed: a list, e.g. ['red']"),
        ({"texts": ["a tree"]}, "this prior was trained without captions"),
        ({"count": 0}, "count=0; allowed: 1 or more"),
        ({"top_p": 2.0}, "sampling.top_p=[2.0]; allowed"),
        ({"scales": 7}, "sampling.scales=7; allowed: 1 to 3"),
    ],
)
def test_what_cannot_be_drawn_is_answered_by_one_line(model, keys, words):
    with pytest.raises(octaves.OctavesError, match=re.escape(words)):
        model.sample(**keys)


def test_a_device_that_is_not_there(finished):
    for name in ("quantum", "cuda:99"):
        with pytest.raises(octaves.OctavesError, match=f"device={name}: ") as caught:
            octaves.load(finished / "run", device=name)
        assert "\n" not in str(caught.value)


def test_loading_leaves_the_models_of_the_commands_alone(finished, model):
    models = load_models(load_config(finished / "tiny.yaml", [f"run={finished}/run"]))
    assert model.layout == models.tokenizer.layout and model.channels == 3 and model.image_size == (16, 16)
    assert model.class_names == models.prior.class_names
