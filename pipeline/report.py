"""report.html: what an evaluation found, in one file that needs nothing else, on a phone and on a desk.

It is made from ``metrics`` (the content of metrics.json) and the pictures in the folder; parts that are not there are
left out, and the reasons stand at the end.
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from omegaconf import OmegaConf

CREDIT = "Icons: Twemoji by Twitter, Inc. and other contributors, CC-BY 4.0 (creativecommons.org/licenses/by/4.0)."
# Mid greys and colours that hold on white and on black: the page follows the reader's colour scheme.
INK = "#858585"
COLOURS = ("#3f7fbf", "#c9732c")
MAX_PANELS = 12

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
            "Scale by scale",
            "The first k scales decoded alone, coarse to fine, each at its own size (enlarged).",
            folder / "prefixes.png",
        ),
        prefix_table(metrics),
        section("Samples", "Drawn from the prior, not selected: the first of every class.", folder / "samples.png"),
        class_table(metrics),
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
            f"{rate['tokens_per_image']:g} tokens an image, all of equal length; to be read beside the PSNR.",
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
    if "fd_lite0" in tokenizer:
        rows.append(frechet_row("Fréchet distance of reconstructions", tokenizer["fd_lite0"], None))
    if "fd_lite0" in samples:
        rows.append(frechet_row("Fréchet distance of samples", samples["fd_lite0"], samples["fd_lite0_of_real_images"]))
    if "class_accuracy" in samples:
        entry = samples["class_accuracy"]
        rows.append(
            Row(
                "Class accuracy of samples",
                f"{entry['balanced']:.1%}",
                f"{entry['baseline_held_out']:.1%} on held-out images",
                "Share that a classifier of the training set puts in the class asked for, mean over classes.",
            )
        )
    for space, words in (("classifier", "the classifier's features"), ("lite0", "EfficientNet-Lite0's features")):
        if f"coverage_{space}" in samples:
            entry = samples[f"coverage_{space}"]
            beside = f"{entry['baseline_of_real_images']:.1%} by {entry['num_baseline']:,} training images"
            meaning = f"Share of held-out images with a sample in their neighbourhood, in {words}: lost modes lower it."
            rows.append(Row(f"Coverage ({space})", f"{entry['value']:.1%}", beside, meaning))
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


def frechet_row(name: str, entry: dict[str, Any], baseline: dict[str, Any] | None) -> Row:
    """A row for fd_lite0, with its N and its caveats."""
    beside = (
        "0 at best" if baseline is None else f"{baseline['value']:.1f} for {baseline['num_judged']:,} training images"
    )
    meaning = (
        f"fd_lite0 (no FID) of {entry['num_judged']:,} against {entry['num_reference']:,} images; lower is better."
    )
    if entry["too_few_images"]:
        meaning += " Too few images for an unbiased value: compare at this N only."
    return Row(name, f"{entry['value']:.1f}", beside, meaning + same_backbone(entry))


def same_backbone(entry: dict[str, Any]) -> str:
    """A warning where the judge also was the teacher."""
    return " The tokenizer's loss used the same network, which flatters it." if entry["same_backbone_as_loss"] else ""


def headline(rows: list[Row]) -> str:
    """The table of headline numbers."""
    cells = "".join(
        f'<tr><td>{escape(row.name)}</td><td class="value">{escape(row.value)}</td>'
        f'<td>{escape(row.beside)}</td><td class="note">{escape(row.meaning)}</td></tr>'
        for row in rows
    )
    head = "<thead><tr><th>Measure</th><th>Value</th><th>Beside</th><th>Meaning</th></tr></thead>"
    return f'<h2>Numbers</h2><table class="headline">{head}<tbody>{cells}</tbody></table>'


def section(title: str, words: str, picture: Path) -> str:
    """A heading, a sentence and a picture; nothing where there is no picture."""
    if not picture.exists():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    kind = "plot" if picture.name == "curves.png" else "sheet"
    image = f'<img class="{kind}" alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(words)}</p><div class="wide">{image}</div>'


def table(head: list[str], rows: list[list[str]], share_last: bool = False) -> str:
    """A table of text cells; with ``share_last`` the last cell is a share in [0, 1], shown as a bar."""
    lines = []
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if share_last:
            cells[-1] = f'<td class="bars"><span class="bar" style="width:{100 * float(row[-1]):.1f}%"></span></td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="figures{" barred" * share_last}">{inner}</table></div>'


def prefix_table(metrics: dict[str, Any]) -> str:
    """PSNR of every prefix of scales."""
    found = metrics["tokenizer"]["prefixes"]
    rows = [
        [str(entry["num_scales"]), "x".join(map(str, entry["image_size"])), f"{entry['psnr_mean_of_images']:.2f}"]
        for entry in found
    ]
    return table(["Scales", "Image", "PSNR, dB"], rows) if rows else ""


def class_table(metrics: dict[str, Any]) -> str:
    """Class accuracy of samples and held-out images."""
    samples = metrics.get("samples", {})
    if "class_accuracy" not in samples:
        return ""
    names = samples["classifier"]["class_names"]
    pairs = zip(
        names, samples["class_accuracy"]["per_class"], samples["classifier"]["held_out"]["per_class"], strict=True
    )
    rows = [[name, percent(drawn), percent(real)] for name, drawn, real in pairs]
    return table(["Class", "Samples in class", "Held-out images in class"], rows)


def percent(share: float | None) -> str:
    """A share as text; a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def code_table(metrics: dict[str, Any]) -> str:
    """Use of codes and rate per scale."""
    prior = {scale["scale"]: scale for scale in metrics["rate"]["scales"]}
    rows = []
    for use in metrics["codes"]:
        bits = prior[use["scale"]]["prior_bits"]
        rows.append(
            [
                use["scale"] if len({u["field"] for u in metrics["codes"]}) == 1 else f"{use['scale']}, {use['field']}",
                f"{use['num_tokens']:,}",
                f"{use['used']:,} of {use['vocabulary_size']:,}",
                f"{use['perplexity']:.1f}",
                "–" if bits is None else f"{bits / prior[use['scale']]['tokens_per_image']:.2f}",
                str(use["share"]),
            ]
        )
    words = (
        "Codes that occur among the held-out images' tokens, and their perplexity: the number of codes that equal use "
        "would need. No more codes than tokens can occur."
    )
    head = ["Scale", "Tokens", "Codes used", "Perplexity", "Prior, bits a token", "Share used"]
    return f'<h2>Codes</h2><p class="soft">{words}</p>' + table(head, rows, share_last=True)


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


def read_scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """(steps, values) by tag from the TensorBoard files below a folder; where runs overlap, the later one counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: (sorted(values), [values[step] for step in sorted(values)]) for tag, values in found.items()}


def panels_of(scalars: dict[str, Any]) -> dict[str, list[str]]:
    """Panel title to tags, training before validation: losses, bits and distortion first, then perplexities."""
    panels: dict[str, list[str]] = {}
    for tag in sorted(scalars, key=lambda tag: ("perplexity" in tag, tag)):
        name = tag.removeprefix("train/").removeprefix("validation/")
        if name.startswith(("loss/", "bits_per_token", "psnr", "perceptual")) or "perplexity" in name:
            panels.setdefault(name, []).append(tag)
    return dict(list(panels.items())[:MAX_PANELS])


def draw_curves(run: Path, path: Path) -> None:
    """Loss curves of both stages as a transparent PNG; no file where nothing was logged."""
    stages = {stage: read_scalars(run / stage) for stage in ("tokenizer", "prior")}
    panels = [(s, name, tags) for s, scalars in stages.items() for name, tags in panels_of(scalars).items()]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=110, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in grid[len(panels) :]:
            axis.set_visible(False)
        for axis, (stage, name, tags) in zip(grid, panels, strict=False):
            axis.set_title(f"{stage}: {name}", fontsize=9)
            for tag in tags:
                steps, values = stages[stage][tag]
                held_out = tag.startswith("validation/")
                colour = COLOURS[held_out]
                if len(values) > 20 and not held_out:
                    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
                    values = smoothed(values)
                marker = "o" if len(values) == 1 else ""
                axis.plot(steps, values, "--" if held_out else "-", marker=marker, color=colour, linewidth=1.4)
            axis.patch.set_alpha(0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(INK)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("step", fontsize=7)
        figure.savefig(path, transparent=True)


def smoothed(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential average with the start's bias removed."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result
