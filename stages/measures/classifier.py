"""Small classifier trained on the data set itself: a second backbone, independent of the perceptual loss.

It measures whether samples belong to their class, and its features are used for coverage and memorization. It is not
trained on held-out images. Its inputs are thumbnails of at most 32 px, which bounds its cost and that of
nearest-neighbor searches among training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.precision import autocast

BATCH = 128
PEAK_LEARNING_RATE = 4e-3
MAX_SHIFT = 2
LARGEST_SIDE = 32


class Residual(nn.Module):
    """x + conv(relu(norm(x))): full pre-activation (He et al. 2016b) with one convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, h, w] → [B, width, h, w]"""
        return x + self.conv(F.relu(self.norm(x)))


class Network(nn.Module):
    """Network of 0.3 million parameters; the first stride keeps an epoch of 60,000 images short on two cores."""

    def __init__(self, channels: int, num_classes: int, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, stride=2, padding=1), Residual(widths[0])]
        for before, width in zip(widths, widths[1:], strict=False):
            down = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            layers += [nn.BatchNorm2d(before), nn.ReLU(), down, Residual(width)]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Features [B, 128] of pixels [B, C, H, W] in [-1, 1]."""
        return self.body(pixels).mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, num_classes] of pixels [B, C, H, W] in [-1, 1]."""
        return self.head(self.features(pixels))


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of predicted classes."""

    count: int
    """Number of images."""
    total: float
    """Share of correct predictions among all images."""
    balanced: float
    """Mean of the per-class accuracies; classes without images are left out."""
    per_class: list[float | None]
    """Accuracy of each class; None for a class without images."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> Accuracy:
    """Accuracy of predictions [N] against labels [N]. Raises ValueError for an empty set."""
    if not len(labels):
        raise ValueError("got 0 images; an accuracy needs at least one image")
    correct = (predicted == labels).double()
    shares = [float(correct[labels == c].mean()) if (labels == c).any() else None for c in range(num_classes)]
    present = [share for share in shares if share is not None]
    return Accuracy(len(labels), float(correct.mean()), sum(present) / len(present), shares)


class Classifier:
    """A trained network for pixels uint8 [N, C, H, W]; results are on the CPU."""

    def __init__(self, network: Network, num_classes: int, device: torch.device) -> None:
        self.network = network.eval().requires_grad_(False)
        self.num_classes = num_classes
        self.device = device

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Features float32 [N, 128] of the penultimate layer."""
        parts = pixels.split(512)
        return torch.cat([self.network.features(prepare(part.to(self.device))).cpu() for part in parts])

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Class probabilities, float32 [N, num_classes]."""
        return self.network.head(self.features(pixels).to(self.device)).softmax(dim=1).cpu()

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """Most probable class, int64 [N]."""
        return self.network.head(self.features(pixels).to(self.device)).argmax(dim=1).cpu()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The weights by name."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: torch.device) -> Classifier:
        """Inverse of ``to_arrays``. Raises KeyError or RuntimeError for other arrays."""
        num_classes, channels = len(arrays["head.bias"]), arrays["body.0.weight"].shape[1]
        network = Network(channels, num_classes)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
        return cls(network.to(device).to(memory_format=torch.channels_last), num_classes, device)

    def accuracy(self, pixels: Tensor, labels: Tensor) -> Accuracy:
        """Accuracy on pixels uint8 [N, C, H, W] with int64 labels [N]."""
        return accuracy(self.predict(pixels), labels, self.num_classes)


def thumbnails(pixels: Tensor) -> Tensor:
    """Reduce uint8 pixels to [B, C, h, w] with sides of at most 32 px, by averaging; smaller images are unchanged."""
    if max(pixels.shape[-2:]) <= LARGEST_SIDE:
        return pixels
    height, width = (min(side, LARGEST_SIDE) for side in pixels.shape[-2:])
    parts = [F.interpolate(part.float(), (height, width), mode="area") for part in pixels.split(512)]
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def prepare(pixels: Tensor) -> Tensor:
    """Thumbnails of uint8 pixels [B, C, H, W] as float32 [B, C, h, w] in [-1, 1]."""
    return thumbnails(pixels).float() / 127.5 - 1


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images [B, C, H, W] and shift all by up to 2 px, repeating border pixels."""
    batch, _, height, width = pixels.shape
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + shift[1]).clamp(0, width - 1)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    # advanced indices around a slice move the channels to the end
    return pixels[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    num_classes: int,
    steps: int,
    seed: int,
    device: torch.device | str = "cpu",
    precision: str = "32",
) -> Classifier:
    """Train on pixels uint8 [N, 1 or 3, H, W] and int64 labels [N] for ``steps`` class-balanced batches of 128.

    The same seed, device, precision and thread count give the same weights; the global random state is unchanged.
    Raises ValueError for no labels or labels outside ``[0, num_classes)``.
    """
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels {labels.unique().tolist()}; allowed: at least one label, all in [0, {num_classes})")
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(pixels.shape[1], num_classes).to(device).to(memory_format=torch.channels_last)
    weights = 1 / torch.bincount(labels, minlength=num_classes)[labels].double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    rise = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    network.train()
    for _ in range(steps):
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        batch = prepare(augment(pixels[chosen], generator).to(device)).contiguous(memory_format=torch.channels_last)
        with autocast(precision, device):
            logits = network(batch)
        loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return Classifier(network, num_classes, device)
