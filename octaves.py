"""Load a trained model and use it: pixels → tokens → new tokens → pixels.

    import octaves
    model = octaves.load("runs/demo")
    octaves.to_pil(model.sample(count=1, seed=0))[0].save("sample.png")

Images go in as

- a PIL image, a NumPy array uint8 [H, W, C] (or [H, W]), or a list of these. Those of a size that the tokenizer takes
  stay as they are; of all others the middle square is resized to the full size, as in the model's own evaluation;
- a float tensor [B, C, H, W] with values in [-1, 1], of a size that the tokenizer takes.

Images come out as float32 tensors [B, C, H, W] in [-1, 1], on the model's device; ``to_pil`` makes pictures of them.
Every wrong input raises ``OctavesError`` with one line that says what is allowed.
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
"""What is accepted as images: see above."""
BATCH_SIZE = 64
"""Images worked on at once; changes speed and memory only."""


def load(path: str | Path, device: str | torch.device | None = None) -> Model:
    """The model of a run's folder, of a folder that ``octaves export`` wrote, or of a ``tokenizer.safetensors``.

    ``device`` is cpu, cuda, mps or another name that PyTorch knows; None takes a GPU where there is one. Only an export
    knows how its config samples; of a run's folder the sampling settings have their defaults. Raises OctavesError for a
    path without a model, damaged files, and a device that is not there.
    """
    return Model(load_pretrained(path), _device(device))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of images [B, C, H, W] in [-1, 1]; values outside are clamped."""
    if images.ndim != 4:
        raise InputError(f"images of shape {tuple(images.shape)}; allowed: [B, C, H, W]")
    return [pixels_to_picture(image) for image in to_uint8(images.detach()).cpu()]


class Model:
    """A tokenizer and, where there is one, the prior that writes its tokens."""

    tokenizer: Tokenizer
    prior: Prior | None
    """None for a tokenizer alone: then nothing can be sampled."""
    device: torch.device
    sampling: SamplingConfig
    """Settings of ``sample`` and ``upsample`` where a call does not say otherwise."""

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
        """How the tokens of one image are arranged."""
        return self.tokenizer.layout

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a whole image in pixels."""
        return self.layout.image_size

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return self.tokenizer.channels

    @property
    def class_names(self) -> list[str]:
        """Classes that can be asked for, in the order of their ids; none where classes make no difference."""
        return [] if self.prior is None else known_classes(self.prior)

    @torch.no_grad()
    def encode(self, images: Images) -> Tokens:
        """The tokens of images, on the model's device: ``ids`` int64 [B, L, F], ``lengths`` and ``header``.

        Raises OctavesError for anything that is no image, and for tensors of a size that the tokenizer does not take.
        """
        pixels = self._pixels(images, self._fitted)
        return Tokens.cat([self.tokenizer.encode(part) for part in pixels.split(BATCH_SIZE)])

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Images [B, C, h, w] of tokens; of the first scales alone where the decoder can do that.

        Raises OctavesError for ids out of range, and for missing scales that the decoder needs.
        """
        return torch.cat([self.tokenizer.decode(part.to(self.device)) for part in tokens.split(BATCH_SIZE)])

    @torch.no_grad()
    def render(
        self, tokens: Tokens, size: int | tuple[int, int], crop: tuple[int, int, int, int] | None = None
    ) -> Tensor:
        """Images [B, C, height, width] of tokens at any ``size`` (height, width; or one number for a square).

        ``crop`` (top, left, height, width) is the part of the result that is wanted; None: all of it. Raises
        OctavesError for a tokenizer without a head for other sizes than its own.
        """
        whole = (size, size) if isinstance(size, int) else size
        return self.tokenizer.render(tokens.to(self.device), whole, crop)

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
        """New images [N, C, H, W]: ``count`` of every combination of ``classes`` (names or ids) and ``texts``.

        Without both, ``count`` of every class that the prior knows, or just ``count``. Image i of the N is drawn with
        ``seed`` + i, and is the one that the command ``octaves sample`` draws. The other arguments are those of the
        config section ``sampling``; None leaves what ``self.sampling`` says. Raises OctavesError without a prior, for
        classes, texts or settings that it does not know.
        """
        models = self._need_prior()
        if count < 1:
            raise InputError(f"count={count}; allowed: 1 or more")
        settings = self._settings(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p, scales=scales)
        models.check(settings)
        asked = ask(models.prior, _listed(classes, "classes"), _listed(texts, "texts"))
        rows = [prompt for prompt in asked for _ in range(count)]
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
        """Small images made large: [B, C, to, to], ``to`` 0 for the full size; one class and text an image, or none.

        Images have a size that one of the scales decodes to; the prior writes the scales that are missing, image i with
        ``seed`` + i. ``exact`` rounds of back-projection draw the result to what reduces to the small image, ``detail``
        in [0, 1] is its weight against bicubic interpolation. Values are those of 8-bit pictures. Raises OctavesError
        without a prior, where the encoder is not scale-causal, and for sizes that are no scale's.
        """
        models = self._need_prior()
        small = to_uint8(self._pixels(images, picture_to_pixels)).cpu()
        labels = class_ids(_listed(classes, "classes"), known_classes(models.prior)) if classes else [-1] * len(small)
        captions = checked_texts(_listed(texts, "texts"), models.prior.condition.uses_text) or [""] * len(small)
        if len(labels) != len(small) or len(captions) != len(small):
            raise InputError(f"{len(labels)} classes and {len(captions)} texts for {len(small)} images; give one each")
        seeds = [seed + index for index in range(len(small))]
        prompts = models.prompts(labels, captions)
        made = upsample_pixels(models, small, prompts, self.sampling, seeds, to, exact, detail)
        return to_float(made).to(self.device)

    def _need_prior(self) -> Models:
        if self._models is None:
            raise InputError("this is a tokenizer alone: without a prior it draws nothing new; load a whole run")
        return self._models

    def _settings(self, **chosen: Any) -> SamplingConfig:
        """The settings of this model with those that are not None; one number may stand for all scales."""
        changed = {name: value for name, value in chosen.items() if value is not None}
        for name in {"temperature", "top_k", "top_p"} & changed.keys():
            changed[name] = list(changed[name]) if isinstance(changed[name], Sequence) else [changed[name]]
        return dataclasses.replace(self.sampling, **changed)

    def _pixels(self, images: Images, cut: Callable[[Image.Image], Tensor]) -> Tensor:
        """float32 [B, C, H, W] on the model's device; ``cut`` makes uint8 [C, h, w] of a picture."""
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
        several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)
        many = list(images) if several else [images]  # type: ignore[arg-type, list-item]
        pixels = [cut(plain_image(_picture(one), self.channels, self._images.background)) for one in many]
        if len({part.shape for part in pixels}) != 1:
            sizes = ", ".join(dict.fromkeys(f"{part.shape[1]}x{part.shape[2]}" for part in pixels))
            raise InputError(f"images of {sizes or 'no'} pixels; allowed: one or more, all of one size")
        return to_float(torch.stack(pixels)).to(self.device)

    def _fitted(self, picture: Image.Image) -> Tensor:
        """A picture at a size that the tokenizer takes: its own, or the full one."""
        own = picture_to_pixels(picture)
        if tuple(own.shape[1:]) in self.layout.rungs:
            return own
        return view_pixels(picture, self._images, self._images.eval_view)


def _picture(image: object) -> Image.Image:
    """A PIL image of a PIL image or an array. Raises InputError for anything else."""
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
    """A list, empty for None. Raises InputError for a single string, whose letters nobody means."""
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
