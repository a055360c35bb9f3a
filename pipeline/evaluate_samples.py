"""What ``eval`` and ``sweep`` find out about new images: how they are drawn, and what they are measured against."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.files import file_sha256
from data.images.reading import pixels_of
from data.images.source import ImageSource, sha256_of
from data.layout import Tokens
from pipeline.config import Config, to_plain
from pipeline.evaluate_grids import show_grids, show_growing
from pipeline.evaluation_images import Images, prompts_of, read_images
from pipeline.evaluation_pictures import show_captioned, show_neighbours, show_samples
from pipeline.kept import kept
from pipeline.models import Models
from stages.contract import Tokenizer
from stages.measures.backbones import as_rgb
from stages.measures.classifier import Classifier, accuracy, thumbnails
from stages.measures.frechet import measure_frechet
from stages.measures.inception import Inception
from stages.measures.reconstruction import Judge, reconstruct
from stages.measures.samples import HELD_OUT, Space, frechet_key, measure_memorised
from stages.prior.sampling import SamplingConfig

KEPT = "train_as_decoded.npz"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    val: Images
    train: Images
    """Thumbnails."""
    train_source: ImageSource


@dataclass(frozen=True)
class Judges:
    """The networks that look at images; None for one that there is not."""

    lite0: Judge | None
    classifier: Classifier | None
    """Of the training images."""
    inception: Inception | None

    def features(self) -> dict[str, tuple[Callable[[Tensor], Tensor], bool]]:
        """By name: the features of uint8 images, and whether the tokenizer was trained against that network."""
        found: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {}
        if self.lite0 is not None:
            found["lite0"] = (self.lite0.features, self.lite0.same_backbone_as_loss)
        if self.classifier is not None:
            found["classifier"] = (self.classifier.features, False)
        if self.inception is not None:
            found["inception"] = (self.inception.features, False)
        return found

    def spaces(self, held_out: Tensor, real: Tensor) -> dict[str, Space]:
        """The space of every network, with uint8 held-out images and training images [N, C, H, W] in it."""
        return {
            name: Space(name, features, features(held_out), features(real), same)
            for name, (features, same) in self.features().items()
        }


@dataclass(frozen=True)
class Asked:
    """What samples are asked for."""

    labels: Tensor
    """int64 [N]; -1 for none."""
    texts: list[str]
    seeds: list[int]
    rows: Tensor
    """int64 [N]: the held-out image whose caption is each sample's, where captions are asked."""
    by: str
    """In words."""
    conditional: bool
    """Whether a class can be expected of each sample."""


@dataclass(frozen=True)
class Drawn:
    """New images."""

    pixels: Tensor
    """uint8 [N, C, H, W]"""
    tokens: Tokens
    seconds: float
    """To draw and decode them."""


def ask(config: Config, models: Models, val: Images, num_classes: int) -> Asked:
    """``eval.num_samples`` prompts: classes in equal shares, or the captions of held-out images."""
    count, told = config.eval.num_samples, models.prior.condition
    conditional = told.uses_labels or (told.uses_text and bool((val.labels >= 0).any()))
    rows = torch.arange(count) % len(val.labels)
    if told.uses_text:  # the captions of held-out images: what the prior has never read
        labels, texts = val.labels[rows], [val.texts[row] for row in rows.tolist()]
        by = f"{'classes and ' if told.uses_labels else ''}captions of held-out images"
    else:
        labels = torch.arange(count) % num_classes if conditional else torch.full((count,), -1)
        texts, by = [""] * count, "classes in equal shares" if conditional else "none"
    seeds = [config.eval.seed + index for index in range(count)]
    return Asked(labels, texts, seeds, rows, by, conditional)


def draw(models: Models, asked: Asked, settings: SamplingConfig) -> Drawn:
    """One sample a prompt, drawn and decoded."""
    prompts = prompts_of(models, asked.labels, asked.texts)
    started = time.perf_counter()
    tokens = models.draw(prompts, settings, asked.seeds)
    pixels = models.decode(tokens)
    return Drawn(pixels, tokens, time.perf_counter() - started)


def class_accuracy(classifier: Classifier, asked: Asked, drawn: Tensor) -> dict[str, Any]:
    """How often a sample of uint8 ``drawn`` is in the class asked for."""
    known = asked.labels >= 0
    return accuracy(classifier.predict(drawn[known]), asked.labels[known], classifier.num_classes).to_dict()


def save_samples(path: Path, drawn: Tensor, labels: Tensor) -> None:
    """Write uint8 ``drawn`` [N, C, H, W] as OpenAI's evaluator reads it: ``arr_0`` uint8 [N, H, W, 3], no pickles.

    guided-diffusion's ``evaluations/evaluator.py`` takes three channels only, so gray images get three equal ones.
    ``arr_1`` are the classes, -1 for none, which it does not read.
    """
    np.savez_compressed(path, arr_0=as_rgb(drawn).permute(0, 2, 3, 1).contiguous().numpy(), arr_1=labels.numpy())


def measure_samples(
    config: Config,
    folder: Path,
    models: Models,
    reference: Reference,
    val_decoded: Tensor,
    judges: Judges,
    skipped: list[str],
) -> dict[str, Any]:
    """Draw images, write them and their pictures, and measure them against held-out and training images.

    ``val_decoded`` are the held-out images after a pass through the tokenizer.
    """
    val, train, train_source, classifier = reference.val, reference.train, reference.train_source, judges.classifier
    class_names = train_source.class_names
    asked = ask(config, models, val, len(class_names))
    drawn = draw(models, asked, config.sampling)
    count, pixels = len(asked.seeds), drawn.pixels
    save_samples(folder / "samples.npz", pixels, asked.labels)

    real, fake = thumbnails(val.pixels), thumbnails(pixels)
    measured: dict[str, Any] = {
        "num_samples": count,
        "prompts": asked.by,
        "seeds": [asked.seeds[0], asked.seeds[-1]],
        "sampling": to_plain(config.sampling),
        "seconds": drawn.seconds,
        "images_per_second": count / drawn.seconds,
        "memorised_in_pixels": measure_memorised(fake, train.pixels, real, f"pixels of {real.shape[-1]} px"),
    }
    # A copied sequence of tokens decodes to the training image *as the tokenizer sees it*: against the originals the
    # tokenizer's own error would hide the copy.
    train_decoded = kept_thumbnails(models.tokenizer, train_source, train.indices, config, models.device)
    measured["memorised_as_decoded"] = measure_memorised(
        fake, train_decoded, thumbnails(val_decoded), "pixels, all sides decoded by the tokenizer"
    )
    clean = read_images(train_source, config.images, count).pixels
    features: dict[str, Tensor] = {}
    for name, space in judges.spaces(val.pixels, clean).items():
        features[name] = space.features(pixels)
        measured |= space.measure(features[name], config.eval.neighbours, config.eval.seed)
    if judges.lite0 is not None:
        held_out = judges.lite0.spatial(val.pixels)
        for key, images in (("sfd_lite0", pixels), ("sfd_lite0_of_real_images", clean)):
            measured[key] = judges.lite0.frechet(held_out, judges.lite0.spatial(images), HELD_OUT)
    nearest_by = None
    if classifier is not None:
        known = val.labels >= 0
        held_out_accuracy, decoded = (
            classifier.accuracy(images[known], val.labels[known]) for images in (val.pixels, val_decoded)
        )
        measured["classifier"] = {
            "steps": config.eval.classifier_steps,
            "seed": config.eval.seed,
            "class_names": list(class_names),
            "held_out": held_out_accuracy.to_dict(),
            "held_out_decoded": decoded.to_dict(),
        }
        if asked.conditional:
            found = class_accuracy(classifier, asked, pixels)
            measured["class_accuracy"] = {**found, "baseline_held_out": held_out_accuracy.balanced}
        else:
            skipped.append("class accuracy of samples: the prior knows neither classes nor captions of labelled images")
        nearest_by = classifier.features(real), features["classifier"], classifier.features(train.pixels)
        measured["memorised_in_features"] = measure_memorised(nearest_by[1], nearest_by[2], nearest_by[0], "classifier")
    by_text = models.prior.condition.uses_text
    if by_text:
        show_captioned(folder, pixels, val.pixels[asked.rows], asked.texts)
    else:
        show_samples(folder, pixels, asked.labels, class_names if asked.conditional else ())
    show_growing(folder, models, drawn.tokens[:6])
    show_grids(config, folder, models, tuple(class_names) if asked.conditional and not by_text else ())
    show_neighbours(folder, config.images, pixels, fake, train.pixels, train.indices, train_source, nearest_by)
    return measured


def measure_decoded(original: Tensor, decoded: Tensor, judges: Judges, reference: str) -> dict[str, Any]:
    """Fréchet distance of uint8 reconstructions in the spaces that nothing else measures them in."""
    return {
        frechet_key(name): measure_frechet(features(original), features(decoded), reference, same)
        for name, (features, same) in judges.features().items()
        if name != "lite0"
    }


def kept_thumbnails(
    tokenizer: Tokenizer, source: ImageSource, indices: list[int], config: Config, device: torch.device
) -> Tensor:
    """``decoded_thumbnails``, kept in the run's folder ``eval`` for later evaluations of the same tokenizer.

    Where there are many, decoding them is a large part of an evaluation, and no setting of it changes them.
    """
    images = {key: getattr(config.images, key) for key in ("size", "channels", "eval_view", "background")}
    made_of = [tokenizer.precision, device.type, str(torch.__version__), images, source.fingerprint()]
    parts = [file_sha256(Path(config.tokenizer.path)).encode(), json.dumps(made_of).encode()]
    wanted = sha256_of([*parts, np.asarray(indices, np.int64).tobytes()])

    def make() -> dict[str, np.ndarray]:
        return {"pixels": decoded_thumbnails(tokenizer, source, indices, config, device).numpy()}

    return torch.from_numpy(kept(Path(config.run) / "eval" / KEPT, wanted, make)["pixels"])


def decoded_thumbnails(
    tokenizer: Tokenizer, source: ImageSource, indices: list[int], config: Config, device: torch.device
) -> Tensor:
    """Images of a source after a pass through the tokenizer, uint8 [n, C, ≤32, ≤32]."""
    size = config.eval.batch_size
    parts = []
    for start in tqdm(range(0, len(indices), size), "Decoding training images", disable=not config.trainer.progress):
        pixels = pixels_of(source, indices[start : start + size], config.images)
        parts.append(thumbnails(reconstruct(tokenizer, pixels, size, device).pixels))
    return torch.cat(parts)
