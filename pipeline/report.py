"""report.html: what an evaluation found, in one file that needs nothing else, on a phone and on a desk.

It is made from ``metrics`` (the content of metrics.json) and the pictures in the folder; parts that are not there are
left out, and the reasons stand at the end.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from pipeline.report_calibration import calibration_part
from pipeline.report_curves import draw_curves
from pipeline.report_frequencies import frequencies_part
from pipeline.report_lists import colouring_part, lists_part
from pipeline.report_order import order_part
from pipeline.report_samples import FEATURES, spaces_part
from pipeline.report_scales import editing_part, head_part, ladder_part, upsampling_part
from pipeline.report_streams import growing_part, streams_part
from pipeline.report_tables import bias, class_table, code_table, figure, prefix_table, same_backbone, section

CREDIT = "Icons: Twemoji by Twitter, Inc. and other contributors, CC-BY 4.0 (creativecommons.org/licenses/by/4.0)."

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #6a6a6a; --line: #dcdcdc; --bar: #9db7d1; --page: #fdfdfc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e2de; --soft: #9a9894; --line: #3a3a38; --bar: #46627d; --page: #181817; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 2.8rem 0 .6rem; }
p { max-width: 44rem; margin: .4rem 0 .9rem; }
.soft, td.note { color: var(--soft); }
.wide { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
img.sheet { max-width: none; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; }
th, td { padding: .38rem 1.4rem .38rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td.value { white-space: nowrap; font-weight: 600; }
table.figures th:not(:first-child), table.figures td:not(:first-child) { text-align: right; }
table.figures.barred th:last-child { text-align: left; }
.bar { display: block; height: .5rem; margin-top: .5rem; min-width: 1px; background: var(--bar); }
td.bars { width: 11rem; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  table.headline thead { display: none; }
  table.headline tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  table.headline td { display: block; border: 0; padding: .05rem 0; }
}
"""


class Row(NamedTuple):
    """One headline number."""

    name: str
    value: str
    beside: str
    """The number to read it against; empty where there is none."""
    meaning: str


def write_report(folder: Path, metrics: dict[str, Any], run: Path) -> Path:
    """Write ``folder/report.html`` (and ``curves.png`` from the run's TensorBoard files); returns the report."""
    draw_curves(run, folder / "curves.png")
    config = metrics["settings"]["config"]
    parts = [
        f"<h1>{escape(str(config['name']))}</h1>",
        f'<p class="soft">{escape(subtitle(metrics))}</p>',
        headline(rows_of(metrics)),
        section(
            "Reconstructions",
            "Held-out images, what the tokenizer makes of them, and the absolute error times four.",
            folder / "reconstructions.png",
        ),
        section(
            "Worst and best",
            "The held-out images that the tokenizer keeps worst and best, by PSNR.",
            folder / "extremes.png",
        ),
        section(
            "Error by place",
            "Where in the frame it errs: lines are borders of patches, a frame is the border of the image.",
            folder / "errors.png",
        ),
        section(
            "Scale by scale",
            "The first k scales decoded alone, coarse to fine, each at its own size (enlarged).",
            folder / "prefixes.png",
        ),
        prefix_table(metrics),
        frequencies_part(metrics, folder),
        head_part(metrics, folder),
        ladder_part(metrics),
        section(
            "Samples",
            "Drawn from the prior, not selected: the first of every class or caption.",
            folder / "samples.png",
        ),
        class_table(metrics),
        spaces_part(metrics),
        order_part(metrics, folder),
        calibration_part(metrics, folder),
        growing_part(folder),
        streams_part(metrics),
        lists_part(metrics),
        upsampling_part(metrics, folder),
        colouring_part(metrics, folder),
        editing_part(metrics, folder),
        section(
            "Nearest training images",
            "First the first samples, then those of all samples that lie closest to a training image. "
            "A sample that equals its neighbour was memorised, not made.",
            folder / "neighbours.png",
        ),
        code_table(metrics),
        section("Training", "Faint: as logged. Strong: smoothed. Broken: held-out images.", folder / "curves.png"),
        skipped_list(metrics),
        settings_block(metrics),
    ]
    if config["images"]["kind"] == "demo":
        parts.append(f'<p class="soft">{escape(CREDIT)}</p>')
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(str(config['name']))}: evaluation</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def subtitle(metrics: dict[str, Any]) -> str:
    """What was measured, in one line."""
    images = metrics["settings"]["config"]["images"]
    parts = [f"{metrics['settings']['tokenizer']['kind']} tokenizer", f"{images['kind']} images at {images['size']} px"]
    parts.append(f"{metrics['tokenizer']['num_images']:,} held-out images")
    if "samples" in metrics:
        parts.append(f"{metrics['samples']['num_samples']:,} samples")
    else:
        parts.append("no prior: tokenizer alone")
    return " · ".join(parts)


def rows_of(metrics: dict[str, Any]) -> list[Row]:
    """The headline table, without the rows that were not measured."""
    tokenizer, rate, samples = metrics["tokenizer"], metrics["rate"], metrics.get("samples", {})
    rows = [
        Row(
            "PSNR of reconstructions",
            f"{tokenizer['psnr_mean_of_images']:.2f} dB",
            f"{tokenizer['psnr_of_mean_error']:.2f} dB of the mean error",
            "Closeness in pixels, mean over images; higher is better.",
        )
    ]
    if "ssim" in tokenizer:
        rows.append(Row("SSIM", f"{tokenizer['ssim']:.3f}", "1 at best", "Likeness of local structure."))
    if "perceptual_lite0" in tokenizer:
        entry = tokenizer["perceptual_lite0"]
        meaning = "Distance in EfficientNet-Lite0's features; lower is better." + same_backbone(entry)
        rows.append(Row("Perceptual distance", f"{entry['mean']:.3f}", "0 at best", meaning))
    rows.append(
        Row(
            "Rate",
            f"{rate['fixed_length_bits_per_pixel']:.3f} bits/px",
            f"{rate['entropy_bits_per_pixel']:.3f} by entropy",
            f"{rate['tokens_per_image']:g} tokens an image, all of equal cost; to be read beside the PSNR.",
        )
    )
    if rate["prior_bits_per_pixel"] is not None:
        rows.append(
            Row(
                "Rate under the prior",
                f"{rate['prior_bits_per_pixel']:.3f} bits/px",
                f"{rate['prior_bits_per_token']:.2f} bits a token, at {rate['psnr_mean_of_images']:.1f} dB",
                "What held-out images cost the prior; lower is a better prior only for the same tokenizer.",
            )
        )
    for key in ("fd_lite0", "fd_classifier", "fid"):
        if key in tokenizer:
            rows.append(frechet_row(f"{key} of reconstructions", key, tokenizer[key], None))
    for key in ("fd_lite0", "fd_classifier", "fid"):
        if key in samples:
            rows.append(frechet_row(f"{key} of samples", key, samples[key], samples[f"{key}_of_real_images"]))
    if "class_accuracy" in samples:
        entry = samples["class_accuracy"]
        rows.append(
            Row(
                "Class accuracy of samples",
                f"{entry['balanced']:.1%}",
                f"{entry['baseline_held_out']:.1%} on held-out images, "
                f"{samples['classifier']['held_out_decoded']['balanced']:.1%} after the tokenizer",
                "Share that a classifier of the training set puts in the class asked for (or the caption's).",
            )
        )
    for key, space in (
        ("memorised_as_decoded", "pixels after the tokenizer"),
        ("memorised_in_pixels", "pixels"),
        ("memorised_in_features", "features"),
    ):
        if key in samples:
            entry = samples[key]
            meaning = f"Samples as near to a training image as the nearest 1 % of held-out ones, in {space}."
            rows.append(Row(f"Near-copies ({space})", f"{entry['share']:.1%}", "1 % for fresh images", meaning))
    if samples:
        value = f"{samples['images_per_second']:.1f} images/s"
        device = metrics["settings"]["device"]
        rows.append(
            Row("Sampling speed", value, f"{samples['seconds']:.1f} s in all", f"Drawn and decoded on {device}.")
        )
    return rows


def frechet_row(name: str, key: str, entry: dict[str, Any], baseline: dict[str, Any] | None) -> Row:
    """A row for a Fréchet distance, with its N and its caveats."""
    beside = (
        "0 at best"
        if baseline is None
        else f"{figure(baseline['value'])} for {baseline['num_judged']:,} training images"
    )
    features = FEATURES[key.removeprefix("fd_")]
    meaning = (
        f"Fréchet distance in {features} of {entry['num_judged']:,} against {entry['num_reference']:,} images; lower "
        "is better."
    )
    return Row(name, figure(entry["value"]), beside, meaning + bias(entry) + same_backbone(entry))


def headline(rows: list[Row]) -> str:
    """The table of headline numbers."""
    cells = "".join(
        f'<tr><td>{escape(row.name)}</td><td class="value">{escape(row.value)}</td>'
        f'<td>{escape(row.beside)}</td><td class="note">{escape(row.meaning)}</td></tr>'
        for row in rows
    )
    head = "<thead><tr><th>Measure</th><th>Value</th><th>Beside</th><th>Meaning</th></tr></thead>"
    return f'<h2>Numbers</h2><table class="headline">{head}<tbody>{cells}</tbody></table>'


def skipped_list(metrics: dict[str, Any]) -> str:
    """What was not measured, and why."""
    items = "".join(f"<li>{escape(line)}</li>" for line in metrics["skipped"])
    return f"<h2>Not measured</h2><ul>{items}</ul>" if items else ""


def settings_block(metrics: dict[str, Any]) -> str:
    """Every setting, folded."""
    settings = {key: value for key, value in metrics["settings"].items() if key != "config"}
    text = OmegaConf.to_yaml(OmegaConf.create({**settings, "config": metrics["settings"]["config"]}))
    folded = f"<summary>All that these numbers depend on</summary><pre>{escape(text)}</pre>"
    return f"<h2>Settings</h2><details>{folded}</details>"
