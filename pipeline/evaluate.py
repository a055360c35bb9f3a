"""eval: tokenizer, prior and images to ``metrics.json``, ``samples.npz``, pictures and ``report.html``.

What is notable here:

- without a prior the tokenizer is evaluated alone, so that studies of tokenizers need no stage 2;
- every number stands beside what makes it readable: distortion beside rate, a distance of samples beside the same
  distance between real images, class accuracy of samples beside that of held-out images;
- what cannot be measured (no labels, no weights) is named under ``skipped``, never silently absent;
- ``metrics.json`` is written last: a folder with one is whole.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import write_atomically
from data.images.source import ImageSource, sha256_of
from data.images.sources import open_source
from data.tokens.manifest import Manifest, check_belongs, has_manifest
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.evaluate_colours import check_order, measure_colouring
from pipeline.evaluate_frequencies import measure_scales
from pipeline.evaluate_grids import shown_settings
from pipeline.evaluate_heads import measure_head
from pipeline.evaluate_lists import measure_lists
from pipeline.evaluate_order import measure_order
from pipeline.evaluate_samples import Judges, Reference, measure_decoded, measure_samples
from pipeline.evaluate_scales import check_scales, load_baseline, measure_editing, measure_ladder, measure_upsampling
from pipeline.evaluate_streams import bits_of_scales, measure_rates, show_finished
from pipeline.evaluation_images import Images, prompts_of, read_images
from pipeline.evaluation_pictures import show_errors, show_extremes, show_prefixes, show_reconstructions
from pipeline.kept import kept
from pipeline.models import Models, assemble, check_images
from pipeline.placement import device_name, device_of
from pipeline.report import write_report
from pipeline.report_calibration import draw_calibration
from pipeline.run import need
from stages.contract import Tokenizer
from stages.measures.backbones import BackboneError
from stages.measures.calibration import measure_calibration
from stages.measures.classifier import Classifier, train_classifier
from stages.measures.codes import joint_use
from stages.measures.inception import Inception
from stages.measures.ladder import Contender
from stages.measures.perceptual import Lite0Perceptual
from stages.measures.rate import sums_of_scales
from stages.measures.reconstruction import (
    ORIGINALS,
    Judge,
    Said,
    measure_nll,
    measure_rate,
    measure_reconstruction,
    reconstruct,
)
from stages.precision import NAMES, resolve
from stages.tokenizer.heads import NO_HEAD
from stages.weights import check_pair, file_sha256, load_prior, load_tokenizer, tokens_sha256

KEPT_CLASSIFIER = "classifier.npz"


def evaluate(config: Config) -> Path:
    """Measure what the run has and write ``<run>/eval/<config.eval.name>``; returns that folder.

    Raises RunError when the tokenizer is missing or parts do not belong together, WeightsError and CacheError for
    damaged files, and CorruptImage for an unreadable image (unless ``images.skip_corrupt``).
    """
    path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    tokenizer, metadata = load_tokenizer(path)
    check_parts(config, tokenizer, path)
    device = device_of(config)
    tokenizer.to(device)
    precision = resolve(config.eval.precision, device)
    models = load_matching_prior(config, tokenizer, path)
    tokenizer.precision = precision
    if models is not None:
        models.prior.precision = precision
    skipped: list[str] = []
    judge = load_judge(metadata.get("perceptual", config.tokenizer_training.perceptual), device, skipped)
    inception = load_inception(config, device, skipped)
    baseline = load_baseline(config, tokenizer, judge, device)
    source = open_source(config.images, "val")
    if models is not None:
        check_classes(models, source)
        check_order(config, models)
    folder = empty_folder(Path(config.run) / "eval" / config.eval.name)

    val = read_images(source, config.images, config.eval.num_images)
    made = reconstruct(tokenizer, val.pixels, config.eval.batch_size, device)
    measured = measure_reconstruction(val.pixels, made, judge)
    measured["prefixes"], spectrum = measure_scales(config, folder, tokenizer, val, made, judge, device)
    show_reconstructions(folder, val.pixels, made.pixels)
    show_extremes(folder, val.pixels, made.pixels)
    show_errors(folder, val.pixels, made.pixels)
    show_prefixes(folder, tokenizer, val.pixels, made.tokens, device)

    metrics: dict[str, Any] = {"settings": settings(config, path, metadata["kind"], device), "tokenizer": measured}
    own = Contender(tokenizer, judge)
    metrics["spectrum"] = spectrum
    metrics["ladder"] = measure_ladder(config, own, baseline, models, val, made, device, skipped)
    metrics["head"] = measure_head(config, folder, tokenizer, source, val, made, judge, device, skipped)
    streams = metrics["streams"] = measure_rates(config, tokenizer, models, val, made, measured)
    metrics["lists"] = measure_lists(config, tokenizer, val, made)
    bits, header_bits = (None, 0.0) if streams is None else (bits_of_scales(streams), streams["header_bits"])
    bits_by_position: list[float] | None = None
    classifier = None
    if models is None:
        skipped.append(f"samples and prior bits: no prior at {config.prior.path}; the tokenizer was evaluated alone")
        if config.eval.upsample_from or config.eval.edit_frozen or config.eval.num_colorized:
            skipped.append("upsampling, editing and colouring: without a prior nothing writes what is missing")
    else:
        asked = prompts_of(models, val.labels, val.texts)
        if not models.prior.likelihood:
            skipped.append(
                f"the prior's bits and its calibration: prior.order={models.prior.order} predicts masked tokens given "
                "others of their scale, which is no likelihood and cannot be compared with one"
            )
        elif streams is None:
            said = measure_nll(models.prior, made.tokens, asked, config.eval.batch_size, device)
            bits_by_position = said.bits
            bits = sums_of_scales(bits_by_position, tokenizer.layout)
            metrics["calibration"] = calibration_of(folder, tokenizer, said)
        else:
            skipped.append("calibration of the prior: it is measured for tokens of fixed length")
        train_source = open_source(config.images, "train")
        train = read_images(train_source, config.images, config.eval.num_train_reference, small=True)
        classifier = fit_classifier(config, train, len(source.class_names), device, skipped)
        judges = Judges(judge, classifier, inception)
        reference = Reference(val, train, train_source)
        metrics["samples"] = measure_samples(config, folder, models, reference, made.pixels, judges, skipped)
        if config.eval.upsample_from:
            metrics["upsampling"] = measure_upsampling(config, folder, models, val, made, judge)
        if config.eval.num_colorized:
            metrics["colouring"] = measure_colouring(config, folder, models, val, made, train, judge)
        show_finished(config, folder, models, val, made.tokens)
        if config.eval.edit_frozen:
            metrics["editing"] = measure_editing(
                config, folder, models, val, made, classifier, source.class_names, skipped
            )
    measured |= measure_decoded(val.pixels, made.pixels, Judges(None, classifier, inception), ORIGINALS)
    metrics["rate"], uses = measure_rate(tokenizer, made.tokens, bits, measured, header_bits)
    metrics["codes"] = [use.to_dict() for use in uses]
    metrics["joint_codes"] = [use.to_dict() for use in joint_use(made.tokens, tokenizer.layout)] or None
    metrics["order"] = measure_order(
        folder, tokenizer, models, val, made, bits_by_position, uses, config.eval.batch_size, device, skipped
    )
    metrics["skipped"] = skipped
    metrics = {key: value for key, value in metrics.items() if value is not None}
    write_report(folder, metrics, Path(config.run))
    # A value that is not finite would not be JSON: better to fail here than in the reader.
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "metrics.json", text.encode() + b"\n")
    return folder


def check_parts(config: Config, tokenizer: Tokenizer, path: Path) -> None:
    """Raise RunError or CacheError when config, tokenizer and token cache do not belong together."""
    if config.sampling.scales:
        raise RunError(f"sampling.scales={config.sampling.scales}: eval compares whole images; set it to 0")
    check_images(tokenizer, config.images.channels, config.images.size, config.images.size)
    check_scales(config, tokenizer)
    if config.eval.head_sizes and not tokenizer.renders:
        raise RunError(f"eval.head_sizes={config.eval.head_sizes}: {NO_HEAD}")
    shown_settings(config, tokenizer.layout)
    if has_manifest(config.tokens.path):
        check_belongs(Manifest.load(config.tokens.path), path, tokens_sha256(path))


def check_classes(models: Models, source: ImageSource) -> None:
    """Raise RunError when the prior knows other classes than the images have."""
    prior = models.prior
    if prior.condition.uses_labels and list(source.class_names) != list(prior.class_names):
        raise RunError(
            f"the prior knows the classes {', '.join(prior.class_names)}, the images have "
            f"{', '.join(source.class_names)}; set images to those that the tokens were made of"
        )


def load_matching_prior(config: Config, tokenizer: Tokenizer, tokenizer_path: Path) -> Models | None:
    """The models, or None where there is no prior yet. Raises WeightsError for a prior of another tokenizer."""
    path = Path(config.prior.path)
    if not path.exists():
        return None
    prior, metadata = load_prior(path)
    check_pair(metadata, path, tokenizer_path)
    return assemble(config, tokenizer, prior)


def empty_folder(folder: Path) -> Path:
    """The folder without the files of an earlier evaluation: a killed one must not leave a mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "metrics.json", folder / "report.html", folder / "samples.npz", *folder.glob("*.png")):
        old.unlink(missing_ok=True)
    return folder


def settings(config: Config, path: Path, kind: str, device: torch.device) -> dict[str, Any]:
    """All that the numbers depend on."""
    prior = Path(config.prior.path)
    precision, sampling = (resolve(part.precision, device) for part in (config.eval, config.sampling))
    baseline, inception = (
        None if each is None else Path(each) for each in (config.eval.baseline, config.eval.inception)
    )
    return {
        "config": to_plain(config),
        "tokenizer": {"path": str(path), "sha256": file_sha256(path), "kind": kind},
        "prior": {"path": str(prior), "sha256": file_sha256(prior)} if prior.exists() else None,
        "baseline": None if baseline is None else {"path": str(baseline), "sha256": file_sha256(baseline)},
        "choice_of_images": "the first of a permutation of each side, fixed by images.split_seed",
        "pixel_range": [-1, 1],
        "fd_lite0": "timm tf_efficientnet_lite0 (ImageNet), mean of block 10, 112 channels; under 64 px enlarged to 64",
        "sfd_lite0": "the same network, first 7 channels of the map of stride 8, averaged to 8x8 places",
        "inception": None if inception is None else {"path": str(inception), "sha256": file_sha256(inception)},
        "precision": (
            f"tokenizer, prior and classifier's training {NAMES[precision]}, sampling {NAMES[sampling]}, judges "
            "float32, Fréchet distance and PSNR float64"
        ),
        "precisions": {"eval": precision, "sampling": sampling},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def load_judge(trained_with: str, device: torch.device, skipped: list[str]) -> Judge | None:
    """Lite0's distance and features, or None and a line in ``skipped`` where the weights are not installed.

    ``trained_with`` is the backbone of the tokenizer's own perceptual loss: figures of the same one flatter it.
    """
    try:
        return Judge(Lite0Perceptual().to(device), device, trained_with == Lite0Perceptual.name)
    except BackboneError as error:
        skipped.append(f"perceptual distance and fd_lite0: {error}")
        return None


def load_inception(config: Config, device: torch.device, skipped: list[str]) -> Inception | None:
    """Inception with the weights of ``eval.inception``, or None and a line in ``skipped``. Raises RunError."""
    path = config.eval.inception
    if path is None:
        skipped.append("fid: no weights of Inception; give their file as eval.inception=<path>")
        return None
    if not Path(path).is_file():
        raise RunError(f"eval.inception={path}: no such file; give the weights of Inception, or leave it out")
    try:
        return Inception(path, device)
    except BackboneError as error:
        skipped.append(f"fid: {error}")
        return None


def fit_classifier(
    config: Config, train: Images, num_classes: int, device: torch.device, skipped: list[str]
) -> Classifier | None:
    """A classifier of the training images, or None and a line in ``skipped``.

    The trained classifier is kept in the run's folder ``eval``. Training it takes most of the time of a small
    evaluation, and neither the prior nor the sampling settings change it.
    """
    known = train.labels >= 0
    if not config.eval.classifier or num_classes < 2 or not known.any():
        reason = "eval.classifier is off" if not config.eval.classifier else "the images have no classes"
        skipped.append(f"class accuracy, and all that is measured in the classifier's features: {reason}")
        return None
    steps = config.eval.classifier_steps
    precision = resolve(config.eval.precision, device)
    pixels, labels = train.pixels[known], train.labels[known]

    def make() -> dict[str, np.ndarray]:
        trained = train_classifier(pixels, labels, num_classes, steps, config.eval.seed, device, precision)
        return trained.to_arrays()

    how = [
        num_classes,
        steps,
        config.eval.seed,
        precision,
        device.type,
        torch.get_num_threads(),
        str(torch.__version__),
    ]
    code = Path(inspect.getfile(Classifier)).read_bytes()
    wanted = sha256_of([json.dumps(how).encode(), code, pixels.numpy().tobytes(), labels.numpy().tobytes()])
    return Classifier.from_arrays(kept(Path(config.run) / "eval" / KEPT_CLASSIFIER, wanted, make), device)


def calibration_of(folder: Path, tokenizer: Tokenizer, said: Said) -> dict[str, Any] | None:
    """Calibration of what a prior says of held-out tokens; None where it does not say. Draws ``calibration.png``."""
    if said.confidence is None or said.hit is None:
        return None
    layout = tokenizer.layout
    ends = dict(zip((scale.name for scale in layout.scales), layout.ends_of_scales, strict=True))
    found = measure_calibration(said.confidence, said.hit, ends)
    draw_calibration(found, folder / "calibration.png")
    return found
