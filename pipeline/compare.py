"""compare: the main metrics of several evaluations in one table, with differences between comparable values.

Each metric lists the settings it depends on. If they differ between two runs (other images, another N, another
backbone, another machine), the table shows both values without a difference and names the settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.rates import SAME
from pipeline.report_tables import figure
from stages.measures.frechet import FRECHET_MINIMUM

IMAGES = tuple(
    f"settings.config.{section}.{key}" for section, keys in SAME.items() for key in keys if key != "num_images"
)
RECONSTRUCTED = (*IMAGES, "tokenizer.num_images")
DRAWN = (*RECONSTRUCTED, "samples.num_samples", "samples.prompts")
NEIGHBOURS = (*DRAWN, "settings.config.eval.neighbours")
CLASSIFIER = tuple(f"settings.config.eval.{key}" for key in ("classifier_steps", "num_train_reference", "seed"))
MACHINE = ("settings.device", "settings.threads", "settings.config.eval.batch_size")
LITE0 = ("settings.fd_lite0",)
INCEPTION = ("settings.inception.sha256",)


@dataclass(frozen=True)
class Figure:
    """A metric, one row of the table."""

    title: str
    key: str
    """Dotted key in metrics.json."""
    better: str
    """lower, higher, or empty if neither is better."""
    depends_on: tuple[str, ...]
    """Dotted keys that must be equal for a meaningful difference."""


FIGURES = (
    Figure("PSNR of reconstructions, dB", "tokenizer.psnr_mean_of_images", "higher", RECONSTRUCTED),
    Figure("SSIM of reconstructions", "tokenizer.ssim", "higher", RECONSTRUCTED),
    Figure("Perceptual distance (lite0)", "tokenizer.perceptual_lite0.mean", "lower", RECONSTRUCTED),
    Figure("fd_lite0 of reconstructions", "tokenizer.fd_lite0.value", "lower", (*RECONSTRUCTED, *LITE0)),
    Figure("fd_classifier of reconstructions", "tokenizer.fd_classifier.value", "lower", (*RECONSTRUCTED, *CLASSIFIER)),
    Figure("fid of reconstructions", "tokenizer.fid.value", "lower", (*RECONSTRUCTED, *INCEPTION)),
    Figure("Rate, bits/px", "rate.fixed_length_bits_per_pixel", "lower", RECONSTRUCTED),
    Figure("Rate under the prior, bits/px", "rate.prior_bits_per_pixel", "lower", RECONSTRUCTED),
    Figure("Bits a token", "rate.prior_bits_per_token", "lower", (*RECONSTRUCTED, "settings.tokenizer.sha256")),
    Figure("Calibration error", "calibration.expected_calibration_error", "lower", RECONSTRUCTED),
    Figure("fd_lite0 of samples", "samples.fd_lite0.value", "lower", (*DRAWN, *LITE0)),
    Figure("sfd_lite0 of samples", "samples.sfd_lite0.value", "lower", (*DRAWN, "settings.sfd_lite0")),
    Figure("fd_classifier of samples", "samples.fd_classifier.value", "lower", (*DRAWN, *CLASSIFIER)),
    Figure("fid of samples", "samples.fid.value", "lower", (*DRAWN, *INCEPTION)),
    # unbiased, so comparable between different numbers of samples
    Figure("kd_lite0 of samples", "samples.kd_lite0.mean", "lower", (*IMAGES, "samples.prompts", *LITE0)),
    Figure("Precision (lite0)", "samples.manifold_lite0.precision", "higher", (*NEIGHBOURS, *LITE0)),
    Figure("Recall (lite0)", "samples.manifold_lite0.recall", "higher", (*NEIGHBOURS, *LITE0)),
    Figure("Density (lite0)", "samples.manifold_lite0.density", "", (*NEIGHBOURS, *LITE0)),
    Figure("Coverage (lite0)", "samples.coverage_lite0.value", "higher", (*NEIGHBOURS, *LITE0)),
    Figure("Coverage (classifier)", "samples.coverage_classifier.value", "higher", (*NEIGHBOURS, *CLASSIFIER)),
    Figure("Class accuracy of samples", "samples.class_accuracy.balanced", "higher", (*DRAWN, *CLASSIFIER)),
    Figure(
        "Near-copies, as decoded",
        "samples.memorised_as_decoded.share",
        "lower",
        (*DRAWN, "samples.memorised_as_decoded.num_train"),
    ),
    Figure("Sampling, images/s", "samples.images_per_second", "higher", MACHINE),
)


@dataclass
class CompareRequest:
    """Keys of ``compare``."""

    runs: str = ""
    """Evaluation folders (with metrics.json), comma-separated; differences are relative to the first."""
    out: str = "compare"
    """Folder for compare.json and compare.md."""


def compare_runs(arguments: Sequence[str]) -> Path:
    """Write ``compare.json`` and ``compare.md`` for ``runs=``. Returns the path of the Markdown table.

    Raises RunError for fewer than two evaluations, for a missing or invalid one, and for an unknown key.
    """
    request = read_request(arguments)
    folders = [Path(part.strip()) for part in request.runs.split(",") if part.strip()]
    if len(folders) < 2:
        raise RunError("runs= needs two or more evaluation folders, comma-separated, e.g. runs/a/eval/default")
    runs = [read_evaluation(folder) for folder in folders]
    names = names_of(folders)
    comparison = {
        "runs": [
            {"name": name, "folder": str(folder), "tokenizer_sha256": look_up(run, "settings.tokenizer.sha256")}
            for name, folder, run in zip(names, folders, runs, strict=True)
        ],
        "settings_that_differ": differing(runs),
        "figures": [row for figure in FIGURES if (row := compare_figure(figure, runs)) is not None],
    }
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(names, comparison)
    (out / "compare.json").write_text(json.dumps(comparison, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "compare.md").write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {out / 'compare.json'} and {out / 'compare.md'}")
    return out / "compare.md"


def read_request(arguments: Sequence[str]) -> CompareRequest:
    """Parse ``key=value`` arguments. Raises RunError, naming the first unknown one."""
    own = [field.name for field in fields(CompareRequest)]
    chosen = {}
    for item in arguments:
        key, equals, value = item.partition("=")
        if not equals or key not in own:
            raise RunError(f"compare: {item!r}; allowed: runs=folder,folder and out=folder, no CONFIG")
        chosen[key] = value
    return CompareRequest(**chosen)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the metrics of an evaluation. Raises RunError if they are missing or invalid."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise RunError(f"{path} is missing: give evaluation folders, e.g. runs/fashion/eval/default")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON; evaluate that run again") from error
    if not isinstance(metrics, dict) or not {"settings", "tokenizer", "rate"} <= metrics.keys():
        raise RunError(f"{path} is not the result of an evaluation; evaluate that run again")
    return metrics


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names of the runs, with the name of the evaluation if it is not ``default``."""
    return [
        folder.resolve().parent.parent.name + (f", {folder.name}" if folder.name != "default" else "")
        for folder in folders
    ]


def look_up(metrics: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None if it is missing."""
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def differing(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of all runs for each config key in which they differ, except paths and names."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {key: entry for name, part in value.items() for key, entry in flat(part, f"{prefix}.{name}").items()}

    plain = [flat(run["settings"]["config"], "") for run in runs]
    keys = [key for key in dict.fromkeys(key for entry in plain for key in entry) if not key.endswith(".path")]
    return {
        key[1:]: [entry.get(key) for entry in plain]
        for key in keys
        if key not in (".name", ".run") and any(entry.get(key) != plain[0].get(key) for entry in plain)
    }


def compare_figure(figure: Figure, runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """One row: values of all runs, differences from the first, and why some are missing; None if no run has the metric.

    ``flattered`` marks values measured with a backbone that the tokenizer was also trained with.
    """
    values = [look_up(run, figure.key) for run in runs]
    if all(value is None for value in values):
        return None
    differences: list[float | None] = [None]
    reasons: list[str | None] = [None]
    for run, value in zip(runs[1:], values[1:], strict=True):
        pairs = [(key, look_up(runs[0], key), look_up(run, key)) for key in figure.depends_on]
        mismatches = [f"{key.rsplit('.', 1)[-1]} {old} / {new}" for key, old, new in pairs if old != new]
        known = value is not None and values[0] is not None
        differences.append(value - values[0] if known and not mismatches else None)
        reasons.append("; ".join(mismatches) if known and mismatches else None)
    owners = [look_up(run, figure.key.rpartition(".")[0]) for run in runs]
    return {
        "title": figure.title,
        "key": figure.key,
        "better": figure.better,
        "values": values,
        "differences": differences,
        "not_comparable": reasons,
        "flattered": [isinstance(owner, dict) and bool(owner.get("same_backbone_as_loss")) for owner in owners],
        "bias": [owner.get("bias") if isinstance(owner, dict) else None for owner in owners],
    }


def markdown(names: Sequence[str], found: dict[str, Any]) -> str:
    """The table as Markdown, with its footnotes and the settings that differ."""
    lines = [f"# {' / '.join(names)}", "", f"Differences are against {names[0]}; ✓ is better, ✗ is worse."]
    head = ["", *names[:1]]
    for name in names[1:]:
        head += [name, "difference"]
    lines += ["", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in found["figures"]:
        cells = [row["title"]]
        for number, value in enumerate(row["values"]):
            marks = " *" * row["flattered"][number] + " †" * bool(row["bias"][number])
            cells.append("–" if value is None else figure(value) + marks)
            if not number:
                continue
            difference, reason = row["differences"][number], row["not_comparable"][number]
            if reason is not None:
                cells.append(f"not comparable: {reason}")
            elif difference is None:
                cells.append("–")
            else:
                good = {"lower": difference < 0, "higher": difference > 0}.get(row["better"])
                mark = "" if good is None or not difference else " ✓" if good else " ✗"
                cells.append(f"{'+' * (difference > 0)}{figure(difference)}{mark}")
        lines.append(f"| {' | '.join(cells)} |")
    if any(any(row["flattered"]) for row in found["figures"]):
        lines += ["", "\\* The tokenizer's loss used the same network, which flatters it."]
    if any(any(row["bias"]) for row in found["figures"]):
        lines += ["", f"† N < {FRECHET_MINIMUM:,}: biased; compare only at equal N."]
    if found["settings_that_differ"]:
        lines += ["", "## Settings that differ", "", f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
        lines += [
            f"| {key} | {' | '.join(map(str, values))} |" for key, values in found["settings_that_differ"].items()
        ]
    return "\n".join(lines) + "\n"
