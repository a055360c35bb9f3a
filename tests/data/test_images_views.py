"""Views: any picture becomes uint8 [C, size, size]; randomness depends only on (seed, epoch, index)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data.images.config import ImagesConfig
from data.images.source import ImagesError, decode
from data.images.views import (
    flips,
    picture_to_pixels,
    pixels_to_picture,
    to_float,
    to_uint8,
    train_pixels,
    view_pixels,
)

VIEWS = ("center", "random_resized_crop")


def view(image, view="center", seed=0, **config):  # type: ignore[no-untyped-def]
    return view_pixels(image, ImagesConfig(size=8, **config), view, generator=np.random.default_rng(seed))


def test_bytes_survive_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
    assert to_float(pixels).min() == -1 and to_float(pixels).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_and_pixels_become_one_another_as_in_torchvision(channels: int) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    picture = pixels_to_picture(pixels)
    expected = to_pil_image(pixels)
    assert (picture.mode, picture.size, picture.tobytes()) == (expected.mode, expected.size, expected.tobytes())
    assert torch.equal(picture_to_pixels(picture), pixels) and torch.equal(pil_to_tensor(picture), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_keeps_a_half_bright_half_dark_picture(mode: str, channels: int) -> None:
    grey = np.zeros((16, 16), dtype=np.uint8)
    grey[:, 8:] = 255
    if mode in ("I;16", "I"):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "PA":
        image = Image.fromarray(grey).convert("P").convert("PA")
    else:
        image = (
            Image.fromarray(grey).convert("RGB").convert(mode) if mode != "F" else Image.fromarray(grey).convert("F")
        )
    assert image.mode == mode
    pixels = view(image, channels=channels)
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == torch.uint8
    assert pixels[..., :2].max() <= 2 and pixels[..., -2:].min() >= 253


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    stored = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16)).save(stored, "png")
    assert view(decode(stored.getvalue(), "deep")).unique().tolist() == [128]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image = image.quantize() if mode == "P" else image.convert(mode)
    stored = io.BytesIO()
    image.save(stored, "png")
    pixels = view(decode(stored.getvalue(), "clear"), background=[10, 20, 30])
    assert pixels.amin((1, 2)).tolist() == pixels.amax((1, 2)).tolist() == [10, 20, 30]


def test_a_colour_named_transparent_shows_the_background() -> None:
    stored = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(stored, "png", transparency=(1, 2, 3))
    assert view(decode(stored.getvalue(), "keyed")).unique().tolist() == [255]


def test_pictures_are_turned_upright() -> None:
    upright = Image.fromarray(np.repeat(np.arange(8, dtype=np.uint8)[:, None] * 30, 8, axis=1))
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(stored, "png", exif=exif)
    assert torch.equal(view(decode(stored.getvalue(), "turned")), view(upright))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("shape", [(1, 1), (10, 10_000), (10_000, 10), (7, 8)])
def test_extreme_shapes_become_squares(name: str, shape: tuple[int, int]) -> None:
    pixels = view(np.full((*shape, 3), 77, dtype=np.uint8), name)
    assert pixels.shape == (3, 8, 8) and pixels.unique().tolist() == [77]


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(image).permute(2, 0, 1)
    for name in ("center", "pad", "random_crop"):
        assert torch.equal(view(image, name), expected)


def test_reduction_does_not_alias() -> None:
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = view(stripes, channels=1)
    assert pixels.min() >= 120 and pixels.max() <= 136


def test_pad_centres_on_black_and_refuses_to_shrink() -> None:
    pixels = view(np.full((4, 2), 255, dtype=np.uint8), "pad", channels=1)[0]
    assert pixels.sum() == 4 * 2 * 255 and (pixels[2:6, 3:5] == 255).all()
    with pytest.raises(ImagesError, match="9 x 4 does not fit into 8 x 8"):
        view(np.zeros((4, 9), dtype=np.uint8), "pad")


def test_random_crop_takes_only_what_is_there() -> None:
    image = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8)).reshape(-1, 8, 8)
    crops = [view(image, "random_crop", seed, channels=1)[0].numpy() for seed in range(5)]
    assert all((windows == crop).all((1, 2)).any() for crop in crops)
    assert len({crop.tobytes() for crop in crops}) > 1
    with pytest.raises(ImagesError, match="too small"):
        view(image[:5], "random_crop")


def test_chance_is_keyed_by_seed_epoch_and_index() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    config = ImagesConfig(size=8, train_view="random_resized_crop", crop_scale=[0.2, 1.0], flip=True)
    same = [train_pixels(image, config, 1, 2, 3) for _ in range(2)]
    assert torch.equal(*same)
    for key in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(same[0], train_pixels(image, config, *key))


def test_the_flip_mirrors_the_view_and_happens_half_of_the_time() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 20, 3), dtype=np.uint8)
    config = ImagesConfig(size=8)
    assert torch.equal(view_pixels(image, config, "center", flip=True), view_pixels(image, config, "center").flip(-1))
    assert 400 < sum(flips(0, 0, index) for index in range(1000)) < 600
