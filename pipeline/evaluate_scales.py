"""What eval finds out about scales: the ladder of resolutions, upsampling from a low rung, editing above one.

All three need tokens of a small image to be the first tokens of the large one. What a tokenizer or prior cannot do is
named under ``skipped``; what a config asks of it in vain is a RunError before any work.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.layout import Tokens
from pipeline.config import Config, to_plain
from pipeline.edit import edit_pixels
from pipeline.errors import RunError
from pipeline.evaluation_images import Images, prompts_of
from pipeline.evaluation_pictures import show_columns, show_upsampling
from pipeline.models import DENSE_ENCODER, Models
from pipeline.upsample import DETAIL, EXACT_ROUNDS, upsample_pixels
from stages.contract import Tokenizer
from stages.measures.classifier import Classifier
from stages.measures.editing import measure_edited, others_of
from stages.measures.ladder import Contender, measure_agreement, measure_rung, measure_sampling_time
from stages.measures.perceptual import Lite0Perceptual
from stages.measures.reconstruction import Judge, Reconstructed
from stages.measures.upsampling import back_project, blend, enlarge, measure_enlarged, reduce_to
from stages.precision import resolve
from stages.weights import load_tokenizer

TIMED_BATCH = 32
"""Sequences drawn at once while sampling is timed, or ``eval.batch_size`` where that is smaller."""
SHOWN, SAMPLES_SHOWN = 8, 3
"""Images on a contact sheet, and upsampled versions of each."""


def check_scales(config: Config, tokenizer: Tokenizer) -> None:
    """Raise RunError for upsampling or editing that the config asks for and this tokenizer cannot do."""
    layout, asked = tokenizer.layout, config.eval
    can = {"upsample_from": len(layout.rungs) > 1, "edit_frozen": layout.encodes_prefixes}
    for key, able in can.items():
        if getattr(asked, key) and not able:
            # streams and lists can be edited, but what they keep has no size of its own to be compared at
            reason = (
                DENSE_ENCODER if layout.ends == "fixed" else "the scales of these tokens have no image of their own"
            )
            raise RunError(f"eval.{key}={getattr(asked, key)}: {reason}; leave eval.{key} out")
    if asked.upsample_from:
        smaller = [height for height, _ in layout.rungs if height < layout.image_size[0]]
        if asked.upsample_from not in smaller:
            raise RunError(
                f"eval.upsample_from={asked.upsample_from}; allowed: {', '.join(map(str, smaller))}, or 0 for none"
            )
    for frozen in asked.edit_frozen:
        if not 1 <= frozen < len(layout.scales):
            raise RunError(
                f"eval.edit_frozen={asked.edit_frozen}; allowed: 1 to {len(layout.scales) - 1} of the "
                f"{len(layout.scales)} scales"
            )


def load_baseline(config: Config, tokenizer: Tokenizer, judge: Judge | None, device: torch.device) -> Contender | None:
    """The tokenizer of ``eval.baseline``. Raises RunError where its images are others, WeightsError for a bad file."""
    if config.eval.baseline is None:
        return None
    baseline, metadata = load_tokenizer(Path(config.eval.baseline))
    found, wanted = ((*each.layout.image_size, each.channels) for each in (baseline, tokenizer))
    if found != wanted:
        raise RunError(
            f"eval.baseline={config.eval.baseline} takes images of {found[0]}x{found[1]} with {found[2]} channels; "
            f"allowed: {wanted[0]}x{wanted[1]} with {wanted[2]}, like tokenizer.path"
        )
    if judge is not None:
        trained_with = metadata.get("perceptual", config.tokenizer_training.perceptual)
        judge = dataclasses.replace(judge, same_backbone_as_loss=trained_with == Lite0Perceptual.name)
    baseline.precision = resolve(config.eval.precision, device)
    return Contender(baseline.to(device), judge)


def measure_ladder(
    config: Config,
    own: Contender,
    baseline: Contender | None,
    models: Models | None,
    val: Images,
    made: Reconstructed,
    device: torch.device,
    skipped: list[str],
) -> dict[str, Any] | None:
    """Agreement of small images' tokens with large ones', every rung of the ladder, and the time to sample up to it.

    Agreement needs a scale-causal encoder, all else the decoder too; None where there is neither.
    """
    layout, size = own.tokenizer.layout, config.eval.batch_size
    several = len(layout.scales) > 1
    measured: dict[str, Any] = {}
    if several and layout.encodes_prefixes:
        measured["agreement"] = measure_agreement(own.tokenizer, val.pixels, made.tokens, size, device)
    if not (several and layout.encodes_prefixes and layout.decodes_prefixes):
        reason = (
            "a scale-causal encoder and decoder (tokenizer.kind=sit, attention=sit-sc)"
            if several
            else "two scales or more"
        )
        skipped.append(f"ladder of resolutions: it needs {reason}")
        return measured or None
    measured |= {
        "baseline": config.eval.baseline,
        "num_images": len(val),
        "rungs": [
            measure_rung(own, baseline, val.pixels, num_scales, size, device)
            for num_scales in sorted(layout.rungs.values())
        ],
    }
    if models is not None and config.eval.timing_repeats and not models.prior.writes_prefixes:
        skipped.append(f"sampling time of every rung: prior.order={models.prior.order} stops at none of them")
    elif models is not None and config.eval.timing_repeats:
        measured["sampling_time"] = time_sampling(config, models, val)
    return measured


def time_sampling(config: Config, models: Models, val: Images) -> dict[str, Any]:
    """Seconds of sampling the tokens of one batch up to every rung; captions are encoded before, nothing is decoded."""
    count = min(config.eval.batch_size, TIMED_BATCH)
    asked = val[torch.arange(count) % len(val)]
    prompts = prompts_of(models, asked.labels, asked.texts)
    seeds = [config.eval.seed + index for index in range(count)]
    quiet = dataclasses.replace(models, progress=False)

    def draw(num_scales: int) -> Tokens:
        return quiet.draw(prompts, dataclasses.replace(config.sampling, scales=num_scales), seeds)

    return {
        "sequences": count,
        "repeats": config.eval.timing_repeats,
        "rungs": measure_sampling_time(draw, models.prior.layout, config.eval.timing_repeats),
    }


def measure_upsampling(
    config: Config, folder: Path, models: Models, val: Images, made: Reconstructed, judge: Judge | None
) -> dict[str, Any]:
    """Held-out images reduced to ``eval.upsample_from`` and upsampled, beside bicubic and the tokenizer's bound."""
    side = config.eval.upsample_from
    rows = torch.arange(min(config.eval.num_upsampled, len(val)))
    original, count = val.pixels[rows], len(rows)
    small = reduce_to(original, side)

    def upsampled(some: Tensor, first_seed: int) -> Tensor:
        asked = val[some]
        prompts = prompts_of(models, asked.labels, asked.texts)
        seeds = [first_seed + row for row in some.tolist()]
        return upsample_pixels(models, small[some], prompts, config.sampling, seeds, exact=0, detail=1)

    started = time.perf_counter()
    drawn = upsampled(rows, config.eval.seed)
    seconds = time.perf_counter() - started

    def finished(decoded: Tensor) -> Tensor:
        low = small[: len(decoded)]
        return blend(back_project(decoded, low, EXACT_ROUNDS), low, DETAIL)

    bound = made.pixels[rows]
    results = {
        "upsampled": finished(drawn),
        "upsampled_as_decoded": drawn,
        "bicubic": enlarge(small, original.shape[-1]),
        "bound": finished(bound),
        "bound_as_decoded": bound,
    }
    shown = rows[:SHOWN]
    others = [finished(upsampled(shown, config.eval.seed + count * version)) for version in range(1, SAMPLES_SHOWN)]
    versions = [results["upsampled"][shown], *others]
    show_upsampling(folder, small, results["bicubic"], versions, results["bound"], original)
    told = models.prior.condition
    return {
        "from": side,
        "to": original.shape[-1],
        "num_images": count,
        "prompts": "each image's own" if told.uses_labels or told.uses_text else "none",
        "seeds": [config.eval.seed, config.eval.seed + count - 1],
        "sampling": to_plain(config.sampling),
        "images_per_second": count / seconds,
        "back_projection_rounds": EXACT_ROUNDS,
        "detail": DETAIL,
        "rows": {name: measure_enlarged(result, original, small, judge) for name, result in results.items()},
    }


def measure_editing(
    config: Config,
    folder: Path,
    models: Models,
    val: Images,
    made: Reconstructed,
    classifier: Classifier | None,
    class_names: tuple[str, ...],
    skipped: list[str],
) -> dict[str, Any] | None:
    """Held-out images redrawn with the prompt of an image of another class; None where nothing could tell."""
    told = models.prior.condition
    usable = val.labels >= 0
    if not told.uses_labels:
        usable &= torch.tensor([bool(text) for text in val.texts])
    rows = usable.nonzero()[:, 0]
    if not (told.uses_labels or told.uses_text):
        reason = "the prior knows neither classes nor captions"
    elif classifier is None:
        reason = "there is no classifier to judge it"
    elif len(val.labels[rows].unique()) < 2:
        reason = "the held-out images that have a prompt are not of two classes or more"
    else:
        reason = ""
    if reason or classifier is None:
        skipped.append(f"editing: {reason}")
        return None
    targets = rows[others_of(val.labels[rows], config.eval.seed)][: config.eval.num_edited]
    rows = rows[: config.eval.num_edited]
    own, new, layout = val[rows], val[targets], models.tokenizer.layout
    prompts = {name: prompts_of(models, each.labels, each.texts) for name, each in (("own", own), ("new", new))}
    seeds = [config.eval.seed + index for index in range(len(rows))]
    before = made.pixels[rows]
    found: list[dict[str, Any]] = []
    columns = [("original", own.pixels), ("decoded", before)]
    for frozen in config.eval.edit_frozen:
        side = layout.scales[frozen - 1].image_size[0]
        small = reduce_to(own.pixels, side)
        entry: dict[str, Any] = {
            "frozen": frozen,
            "image_size": [side, side],
            "before": measure_edited(classifier, before, new.labels, small),
        }
        for name, asked in prompts.items():
            edited = edit_pixels(models, own.pixels, frozen, asked, config.sampling, seeds)
            entry[f"{name}_prompt"] = measure_edited(classifier, edited, new.labels, small)
            columns.append((f"{frozen} kept: {name}", edited))
        found.append(entry)
    names = [text if told.uses_text else "" for text in new.texts]
    names = [text or class_names[label] for text, label in zip(names, new.labels.tolist(), strict=True)]
    show_columns(folder / "editing.png", columns, names, SHOWN)
    return {
        "num_images": len(rows),
        "prompts": "of a held-out image of another class, drawn with eval.seed",
        "seeds": [seeds[0], seeds[-1]],
        "sampling": to_plain(config.sampling),
        "frozen": found,
    }
