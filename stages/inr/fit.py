"""Fit a coordinate network to one image with Adam on the squared error of its pixels."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.images.views import to_float, to_uint8
from stages.inr.variants import VARIANTS
from stages.measures.distortion import psnr

BATCH = 256 * 256
"""Maximum number of pixels per step; for larger images they are drawn at random."""
DECAY = 0.1
"""Factor of the exponential decay of the learning rate over the whole run (WIRE)."""


@dataclass(frozen=True)
class Fit:
    """Result of fitting one network to one image."""

    parameters: int
    """Number of learned real numbers."""
    learning_rate: float
    """Initial learning rate."""
    steps: list[int]
    """Updates done at each measurement; the first is 0."""
    psnr: list[float]
    """PSNR in dB of the 8-bit image at each measurement."""
    diverged: int | None
    """Updates done when the loss or the image was first not finite; None if both always were finite."""
    seconds: float
    """Time of the updates, without measurements."""
    seconds_per_step: float
    pixels: Tensor
    """uint8 [C, H, W] at the last measurement."""


def coordinates(size: tuple[int, int]) -> Tensor:
    """Coordinates (x, y) of pixel centers of an image (height, width), in raster order: float32 [height · width, 2].

    The longer side spans [-1, 1]; the other side has the same scale.
    """
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    doubled = torch.stack((2 * x + 1 - size[1], 2 * y + 1 - size[0]), dim=-1)
    return doubled.flatten(0, 1) / max(size)


def fit_variant(
    name: str,
    image: Tensor,
    hidden: int,
    layers: int,
    steps: int,
    learning_rate: float = 0.0,
    seed: int = 0,
    log_every: int = 50,
    device: torch.device | str = "cpu",
) -> Fit:
    """Build the variant ``name`` and fit it to ``image`` uint8 [C, H, W]. ``learning_rate`` 0 uses that of the variant.

    Seeds torch, so that the result does not depend on earlier fits.
    """
    torch.manual_seed(seed)
    network = VARIANTS[name].build(to_float(image), hidden, layers).to(device)
    return fit(network, image, steps, learning_rate or VARIANTS[name].learning_rate, log_every)


def fit(network: nn.Module, image: Tensor, steps: int, learning_rate: float, log_every: int) -> Fit:
    """Fit ``network`` [P, 2] → [P, C] to ``image`` uint8 [C, H, W] with ``steps`` updates.

    Measures before the first update, after every ``log_every`` updates and after the last. Stops if the loss or the
    image is not finite.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    places = coordinates((image.shape[1], image.shape[2])).to(parameters[0].device)
    targets = to_float(image).flatten(1).T.to(places.device)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: DECAY ** (step / steps))
    measured_steps: list[int] = []
    psnr_values: list[float] = []
    pixels, seconds, diverged, done = torch.zeros_like(image), 0.0, None, 0
    while True:
        if done % log_every == 0 or done == steps:
            colors = rendered(network, places)
            if not colors.isfinite().all():
                diverged = done
                break
            pixels = to_uint8(colors.T.unflatten(1, image.shape[1:]))
            measured_steps.append(done)
            psnr_values.append(float(psnr(pixels[None], image[None])))
        if done == steps:
            break
        start = time.perf_counter()
        chosen = torch.randperm(len(places))[:BATCH].to(places.device) if len(places) > BATCH else slice(None)
        loss = functional.mse_loss(network(places[chosen]), targets[chosen])
        if not math.isfinite(loss.item()):
            diverged = done
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds, done = seconds + time.perf_counter() - start, done + 1
    count = sum(parameter.numel() for parameter in parameters)
    return Fit(count, learning_rate, measured_steps, psnr_values, diverged, seconds, seconds / max(done, 1), pixels)


@torch.no_grad()
def rendered(network: nn.Module, places: Tensor) -> Tensor:
    """Colors of a network at coordinates [P, 2], computed in parts of ``BATCH``: [P, C] on the CPU."""
    return torch.cat([network(part).cpu() for part in places.split(BATCH)])
