"""EfficientNet-Lite0: the packaged weights, the features, and the perceptual distance based on them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from stages.measures import backbones
from stages.measures.backbones import BackboneError, Lite0Features, checkpoint_path, load_lite0, timm_key
from stages.measures.perceptual import Lite0Perceptual, build_perceptual

needs_weights = pytest.mark.skipif(importlib.util.find_spec(backbones.PACKAGE) is None, reason="needs octaves[demo]")


def picture(size: int, seed: int = 0) -> torch.Tensor:
    """A photo-like image [1, 3, size, size] in [-1, 1], with edges and with energy that decreases with frequency."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, size, size)
    for level in range(2, size.bit_length()):
        noise = torch.randn(1, 3, 2**level, 2**level, generator=generator)
        total += F.interpolate(noise, (size, size), mode="bicubic") / 2**level
    total[..., size // 4 : size // 2, size // 3 : size // 2] += 0.5
    return (total / total.abs().max()).clamp(-1, 1)


@pytest.fixture(scope="module")
def perceptual() -> Lite0Perceptual:
    return Lite0Perceptual()


@needs_weights
def test_weights_load_strictly_into_all_layers() -> None:
    weights = torch.load(checkpoint_path(), map_location="cpu", weights_only=True)
    renamed = {timm_key(key) for key in weights}
    assert len(renamed) == len(weights)
    network = load_lite0(weights)
    assert renamed == set(network.state_dict())
    weights.pop("_conv_stem.weight")
    with pytest.raises(RuntimeError, match="conv_stem"):
        load_lite0(weights)


@needs_weights
def test_features_are_frozen_and_deterministic_at_five_strides() -> None:
    features = Lite0Features().train()
    assert not features.training and not any(parameter.requires_grad for parameter in features.parameters())
    maps = features(picture(64))
    assert [tuple(part.shape[1:]) for part in maps] == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(features.channels, features.strides, strict=True)
    ]
    grey = picture(32)[:, :1]
    assert features.pooled(grey).shape == (1, 112)
    assert torch.equal(features.pooled(grey), features.pooled(grey.expand(-1, 3, -1, -1)))
    # the pooled features are the mean of the map at stride 16
    torch.testing.assert_close(features.pooled(picture(64)), maps[3].mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="channels"):
        features(torch.zeros(1, 2, 32, 32))


@needs_weights
def test_spatial_features_see_places_that_pooled_ones_hardly_see() -> None:
    features = Lite0Features()
    image = picture(64)
    assert features.spatial(picture(32)[:, :1]).shape == features.spatial(picture(128)).shape == (1, 7 * 8 * 8)
    expected = F.adaptive_avg_pool2d(features(image)[2][:, :7], 8).flatten(1)
    torch.testing.assert_close(features.spatial(image), expected)
    moved = image.roll(24, 3)

    def change(of) -> float:
        return float((of(moved) - of(image)).norm() / (of(picture(64, 1)) - of(image)).norm())

    assert change(features.spatial) > 1.3 * change(features.pooled)


@needs_weights
@pytest.mark.parametrize("size", [32, 128])
def test_perceptual_distance_orders_damage(perceptual: Lite0Perceptual, size: int) -> None:
    image = picture(size)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    blurred = [perceptual(gaussian_blur(image, [13, 13], [sigma, sigma]), image).item() for sigma in (0.5, 1, 2, 4)]
    noisy = [perceptual(image + amount * noise, image).item() for amount in (0.02, 0.05, 0.1, 0.3)]
    assert perceptual(image, image).item() == 0
    assert blurred == sorted(blurred) and noisy == sorted(noisy) and min(blurred + noisy) > 0


@needs_weights
def test_gradients_reach_the_prediction_alone(perceptual: Lite0Perceptual) -> None:
    prediction, target = (picture(32, seed).requires_grad_() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = perceptual(prediction, target)
    assert distance.dtype == torch.float32 and distance.shape == (1,)
    distance.sum().backward()
    assert prediction.grad is not None and prediction.grad.abs().sum() > 0 and target.grad is None
    with pytest.raises(ValueError, match="4 px"):
        perceptual(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(BackboneError, match=r"make install"):
        build_perceptual("lite0")


def test_names_of_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_perceptual("none") is None
    with pytest.raises(ValueError, match="lite0, lpips-vgg, none"):
        build_perceptual("vgg")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity.__init__", offline)
    with pytest.raises(BackboneError, match="lite0"):
        build_perceptual("lpips-vgg")


def test_lpips_with_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips
    from torchvision.models import vgg16

    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: vgg16(weights=None).features)
    distance = build_perceptual("lpips-vgg")
    assert distance is not None
    prediction = picture(32).requires_grad_()
    # predictions are not clamped in training
    value = distance(prediction[:, :1] * 1.5, picture(32, 1)[:, :1])
    assert value.shape == (1,) and value.item() > 0
    value.sum().backward()
    assert prediction.grad is not None and not distance.state_dict()
