"""Python interface: load a trained model, encode, decode and sample images.

    import octaves
    model = octaves.load("runs/demo")
    octaves.to_pil(model.sample(count=1, seed=0))[0].save("sample.png")

Input images are

- a PIL image, a NumPy array uint8 [H, W, C] (or [H, W]), or a list of these. Sizes that the tokenizer accepts are kept.
  Other images are cropped and resized to the full size with the evaluation view of the model (default: center square);
- or a float tensor [B, C, H, W] with values in [-1, 1], of a size that the tokenizer accepts.

Output images are float32 tensors [B, C, H, W] in [-1, 1], on the device of the model. ``to_pil`` converts them to PIL.
Invalid input raises ``OctavesError`` with one line that says what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import InputError, OctavesError
from data.images.views import picture_to_pixels, pixels_to_picture, plain_image, to_float, to_uint8, view_pixels
from data.layout import TokenLayout, Tokens
from pipeline.models import Models, join
from pipeline.placement import device_for
from pipeline.pretrained import Pretrained, load_pretrained
from pipeline.requests import ask, checked_texts, class_ids, known_classes, to_prompts
from pipeline.upsample import DETAIL, EXACT_ROUNDS, upsample_pixels
from stages.contract import Prior, Tokenizer
from stages.precision import resolve
from stages.prior.sampling import SamplingConfig

__all__ = ["Images", "Model", "OctavesError", "Tokens", "load", "to_pil"]

Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray]
"""Types accepted as input images; see the module docstring."""
BATCH_SIZE = 64
"""Images processed at once; affects only speed and memory."""


def load(path: str | Path, device: str | torch.device | None = None) -> Model:
    """Load a model from a run folder, from a folder written by ``octaves export``, or from a ``tokenizer.safetensors``.

    ``device`` is cpu, cuda, mps or another device name of PyTorch; None selects a GPU if available. An export contains
    the sampling settings of its config; a run folder does not, so it gets the defaults. Raises OctavesError for a path
    without a model, for damaged files and for a device that is not available.
    """
    return Model(load_pretrained(path), _device(device))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images [B, C, H, W] in [-1, 1] to PIL images. Values outside are clamped."""
    if images.ndim != 4:
        raise InputError(f"images of shape {tuple(images.shape)}; allowed: [B, C, H, W]")
    return [pixels_to_picture(image) for image in to_uint8(images.detach()).cpu()]


class Model:
    """A tokenizer and, optionally, the prior of its tokens."""

    tokenizer: Tokenizer
    prior: Prior | None
    """None for a tokenizer alone, which cannot sample."""
    device: torch.device
    sampling: SamplingConfig
    """Default settings of ``sample`` and ``upsample``."""

    def __init__(self, pretrained: Pretrained, device: torch.device) -> None:
        self.tokenizer = pretrained.tokenizer.to(device)
        self.prior, self.device, self.sampling = pretrained.prior, device, pretrained.sampling
        self.tokenizer.precision = resolve(self.sampling.precision, device)
        self._images = pretrained.images
        self._models: Models | None = None
        if self.prior is not None:
            self._models = join(self.tokenizer, self.prior, device, BATCH_SIZE, self.sampling.precision)

    @property
    def layout(self) -> TokenLayout:
        """Arrangement of the tokens of one image."""
        return self.tokenizer.layout

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a full-size image in pixels."""
        return self.layout.image_size

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for gray."""
        return self.tokenizer.channels

    @property
    def class_names(self) -> list[str]:
        """Names of the classes for ``sample``, in the order of their ids; empty if the prior does not use classes."""
        return [] if self.prior is None else known_classes(self.prior)

    @torch.no_grad()
    def encode(self, images: Images) -> Tokens:
        """Encode images to tokens on the device of the model: ``ids`` int64 [B, L, F], ``lengths`` and ``header``.

        Raises OctavesError for input that is not an image, and for tensors of a size that the tokenizer rejects.
        """
        pixels = self._pixels(images, self._fitted)
        return Tokens.cat([self.tokenizer.encode(part) for part in pixels.split(BATCH_SIZE)])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Decode tokens to images [B, C, h, w]. Some decoders also accept only the first scales.

        Raises OctavesError for ids out of range, and if scales are missing that the decoder needs.
        """
        return torch.cat([self.tokenizer.decode(part.to(self.device)) for part in tokens.split(BATCH_SIZE)])

    @torch.no_grad()
    def render(
        self, tokens: Tokens, size: int | tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Decode tokens to images [B, C, height, width] of any ``size`` (height, width; or one number for a square).

        ``crop`` (top, left, height, width) selects a part of the result; None returns all of it. Raises OctavesError
        for a tokenizer without a head for other sizes.
        """
        full_size = (size, size) if isinstance(size, int) else size
        return self.tokenizer.render(tokens.to(self.device), full_size, crop)

    def sample(
        self,
        classes: Sequence[str | int] | None = None,
        texts: Sequence[str] | None = None,
        count: int = 1,
        seed: int = 0,
        *,
        guidance: float | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        scales: int | None = None,
    ) -> Tensor:
        """Sample images [N, C, H, W]: ``count`` for every combination of ``classes`` (names or ids) and ``texts``.

        Without both, ``count`` for every class of the prior, or ``count`` in total for a prior without classes. Image i
        of N uses seed ``seed`` + i and equals that of the command ``octaves sample``. The other arguments are keys of
        the config section ``sampling``; None uses ``self.sampling``. Raises OctavesError without a prior, and for
        unknown classes, texts or settings.
        """
        models = self._need_prior()
        if count < 1:
            raise InputError(f"count={count}; allowed: 1 or more")
        settings = self._settings(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, scales=scales)
        models.check(settings)
        combinations = ask(models.prior, _listed(classes, "classes"), _listed(texts, "texts"))
        rows = [prompt for prompt in combinations for _ in range(count)]
        seeds = [seed + index for index in range(len(rows))]
        return self.decode(models.draw(to_prompts(models, rows), settings, seeds))

    def upsample(
        self,
        images: Images,
        classes: Sequence[str | int] | None = None,
        texts: Sequence[str] | None = None,
        seed: int = 0,
        *,
        to: int = 0,
        exact: int = EXACT_ROUNDS,
        detail: float = DETAIL,
    ) -> Tensor:
        """Upsample images to [B, C, to, to], ``to`` 0 for the full size. Give one class and text per image, or none.

        The size of the images must be that of one of the scales. The prior samples the missing scales, with seed
        ``seed`` + i for image i. ``exact`` rounds of back-projection make the result consistent with the small image.
        ``detail`` in [0, 1] is the weight of the result against bicubic interpolation. Values are rounded to 8 bits.
        Raises OctavesError without a prior, if the encoder is not scale-causal, and for sizes that match no scale.
        """
        models = self._need_prior()
        small = to_uint8(self._pixels(images, picture_to_pixels)).cpu()
        labels = class_ids(_listed(classes, "classes"), known_classes(models.prior)) if classes else [-1] * len(small)
        captions = checked_texts(_listed(texts, "texts"), models.prior.condition.uses_text) or [""] * len(small)
        if len(labels) != len(small) or len(captions) != len(small):
            raise InputError(f"{len(labels)} classes and {len(captions)} texts for {len(small)} images; give one each")
        seeds = [seed + index for index in range(len(small))]
        prompts = models.prompts(labels, captions)
        upsampled = upsample_pixels(models, small, prompts, self.sampling, seeds, to, exact, detail)
        return to_float(upsampled).to(self.device)

    def _need_prior(self) -> Models:
        if self._models is None:
            raise InputError("this is a tokenizer alone: it cannot sample without a prior; load a run that has one")
        return self._models

    def _settings(self, **chosen: Any) -> SamplingConfig:
        """``self.sampling`` with the values that are not None. Single numbers apply to all scales."""
        overrides = {name: value for name, value in chosen.items() if value is not None}
        for name in {"temperature", "top_k", "top_p"} & overrides.keys():
            overrides[name] = list(overrides[name]) if isinstance(overrides[name], Sequence) else [overrides[name]]
        return dataclasses.replace(self.sampling, **overrides)

    def _pixels(self, images: Images, cut: Callable[[Image.Image], Tensor]) -> Tensor:
        """float32 [B, C, H, W] on the device of the model. ``cut`` converts a picture to uint8 [C, h, w]."""
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
                raise InputError(
                    f"a tensor of shape {tuple(images.shape)} and {images.dtype}; allowed: float [B, {self.channels}, "
                    "H, W] in [-1, 1]"
                )
            if not bool((images.abs() <= 1).all()):
                raise InputError(
                    f"a tensor with values from {float(images.min()):g} to {float(images.max()):g}; allowed: -1 to 1"
                )
            return images.to(self.device, torch.float32)
        is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)
        pictures = list(images) if is_batch else [images]  # type: ignore[arg-type, list-item]
        pixels = [cut(plain_image(_picture(one), self.channels, self._images.background)) for one in pictures]
        if len({part.shape for part in pixels}) != 1:
            sizes = ", ".join(dict.fromkeys(f"{part.shape[1]}x{part.shape[2]}" for part in pixels))
            raise InputError(f"images of {sizes or 'no'} pixels; allowed: one or more, all of one size")
        return to_float(torch.stack(pixels)).to(self.device)

    def _fitted(self, picture: Image.Image) -> Tensor:
        """Pixels of a picture at a size that the tokenizer accepts: its own, or the full size."""
        pixels = picture_to_pixels(picture)
        if tuple(pixels.shape[1:]) in self.layout.rungs:
            return pixels
        return view_pixels(picture, self._images, self._images.eval_view)


def _picture(image: object) -> Image.Image:
    """Convert a PIL image or an array to a PIL image. Raises InputError for anything else."""
    if isinstance(image, Image.Image):
        return image
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.size and (image.ndim == 2 or image.shape[2:] in ((1,), (3,))):
            return Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
        kind = f"an array of shape {image.shape} and {image.dtype}"
    raise InputError(
        f"{kind} as an image; allowed: PIL images, arrays uint8 [H, W, C], lists of these, float tensors [B, C, H, W]"
    )


Item = TypeVar("Item")


def _listed(given: Sequence[Item] | None, name: str) -> list[Item]:
    """A list, empty for None. Raises InputError for a single string, which would become a list of letters."""
    if isinstance(given, str):
        raise InputError(f"{name}={given!r}; allowed: a list, e.g. [{given!r}]")
    return [] if given is None else list(given)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return device_for("auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: {str(error).splitlines()[0]}") from error
    return device
