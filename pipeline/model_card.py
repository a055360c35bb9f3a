"""Model card of an export: README.md with the front matter of Hugging Face.

Metrics appear twice: rounded in the table of the report, with explanations, and unrounded in ``model-index``.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from data.images.config import ImagesConfig
from data.images.shards import photos_folder
from pipeline.report import CREDIT, rows_of, subtitle

RECONSTRUCTION = {
    "psnr": ("PSNR of reconstructions, dB", "tokenizer.psnr_mean_of_images"),
    "ssim": ("SSIM of reconstructions", "tokenizer.ssim"),
    "perceptual_lite0": ("Perceptual distance of reconstructions", "tokenizer.perceptual_lite0.mean"),
    "fd_lite0": ("Fréchet distance of reconstructions (fd_lite0, no FID)", "tokenizer.fd_lite0.value"),
    "bits_per_pixel": ("Rate at equal cost of all tokens, bits per pixel", "rate.fixed_length_bits_per_pixel"),
}
GENERATION = {
    "fd_lite0": ("Fréchet distance of samples (fd_lite0, no FID)", "samples.fd_lite0.value"),
    "class_accuracy": ("Class accuracy of samples", "samples.class_accuracy.balanced"),
    "coverage_lite0": ("Coverage (EfficientNet-Lite0)", "samples.coverage_lite0.value"),
    "coverage_classifier": ("Coverage (classifier)", "samples.coverage_classifier.value"),
    "memorised": ("Near-copies of training images, pixels after the tokenizer", "samples.memorised_as_decoded.share"),
    "prior_bits_per_pixel": ("Rate under the prior, bits per pixel", "rate.prior_bits_per_pixel"),
}
"""type: (name, key in metrics.json) of the metrics in ``model-index``."""


@dataclass(frozen=True)
class Facts:
    """Everything that the card reports."""

    config: dict[str, Any]
    """Content of config.json."""
    hashes: dict[str, str]
    """sha256 of every other file, by name."""
    license: str
    images: dict[str, Any]
    """Config section of the training images."""
    counts: dict[str, int]
    """Number of images in train and val; empty if unknown."""
    metrics: dict[str, Any] | None
    """Content of metrics.json."""
    why_not_measured: str
    """Empty if there are metrics."""


def write_card(facts: Facts) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{OmegaConf.to_yaml(OmegaConf.create(front_matter(facts)))}---",
        f"# {facts.config['name']}",
        summary(facts),
        f"## Use\n\n{usage(facts)}",
        f"## Data\n\n{data(facts)}",
        f"## Training\n\n{training(facts)}",
        f"## Evaluation\n\n{evaluation(facts)}",
        f"## Files\n\n{files(facts)}",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """Metadata for Hugging Face."""
    prior = facts.config["prior"]
    task = "unconditional-image-generation" if prior else "image-feature-extraction"
    if prior and reads_text(prior):
        task = "text-to-image"
    tags = ["octaves", "image-tokenizer", facts.config["tokenizer"]["kind"]]
    matter: dict[str, Any] = {
        "license": facts.license,
        "library_name": "octaves",
        "pipeline_tag": task,
        "tags": [*tags, *(["image-generation", "autoregressive"] if prior else [])],
    }
    if facts.metrics is not None:
        kind = str(facts.images["kind"])
        results = [
            {
                "task": {"type": kind_of_task, "name": name},
                "dataset": {"type": kind, "name": f"{kind}, held-out images at {facts.images['size']} px"},
                "metrics": entries,
            }
            for kind_of_task, name, figures in (
                ("image-feature-extraction", "Reconstruction", RECONSTRUCTION),
                (task, "Generation", GENERATION),
            )
            if (entries := list_figures(facts.metrics, figures))
        ]
        matter["model-index"] = [{"name": facts.config["name"], "results": results}]
    return matter


def reads_text(prior: dict[str, Any]) -> bool:
    """Whether a prior uses captions, according to its description in config.json."""
    return prior.get("text") is not None and "text" in prior["condition"]["kind"]


def list_figures(metrics: dict[str, Any], figures: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Unrounded values of all measured metrics, with details from the evaluation: N, backbone, caveats."""
    entries = []
    for kind, (name, place) in figures.items():
        *path, last = place.split(".")
        entry = metrics
        for key in path:
            entry = entry.get(key, {})
        if entry.get(last) is None:
            continue
        details = {"num_images": metrics["tokenizer"]["num_images"]}
        if len(path) > 1:  # the metric has its own entry, with its own details
            details = {key: value for key, value in entry.items() if key != last and not isinstance(value, list | dict)}
        entries.append({"type": kind, "name": name, "value": entry[last], "args": details})
    return entries


def summary(facts: Facts) -> str:
    """A description of the model in a few lines."""
    tokenizer, prior = facts.config["tokenizer"], facts.config["prior"]
    height, width = tokenizer["image_size"]
    layout = tokenizer["layout"]
    length = layout["max_length"] or sum(scale["length"] for scale in layout["scales"])
    number = f"up to {length:,}" if layout["max_length"] else f"{length:,}"
    scales = f" in {len(layout['scales'])} scales" if len(layout["scales"]) > 1 else ""
    lines = [
        f"A `{tokenizer['kind']}` tokenizer: it encodes images of {height} x {width} pixels with "
        f"{tokenizer['channels']} channels, in [-1, 1], to {number} tokens{scales}, and decodes tokens to images."
    ]
    if prior is None:
        lines.append("There is no prior, so it cannot generate images.")
    else:
        lines.append(f"A `{prior['kind']}` prior generates such tokens, and thus new images.")
        if prior["condition"]["kind"] in ("class", "class-text"):
            lines.append(f"Its classes: {', '.join(prior['class_names'])}.")
        if reads_text(prior):
            lines.append(f"Captions are encoded by the text encoder `{prior['text']['encoder']}`.")
    return "\n".join(lines)


def usage(facts: Facts) -> str:
    """Code that loads and uses the model."""
    last = (
        'octaves.to_pil(model.sample(count=1, seed=0))[0].save("sample.png")'
        if facts.config["prior"]
        else "reconstructions = model.decode(model.encode(images))  # images: a PIL image, or a list of them"
    )
    text = f'```python\nimport octaves\nmodel = octaves.load(".")  # this folder\n{last}\n```'
    if "programs" in facts.config:
        listed = [f"- `{name}`: {io['input']} to {io['output']}" for name, io in facts.config["programs"].items()]
        text += (
            "\n\nEncoder and decoder are also included as programs, which need only torch: "
            '`torch.export.load("encoder.pt2").module()(pixels)`. They run on a CPU; B is any batch size.\n\n'
            + "\n".join(listed)
        )
    return text


def data(facts: Facts) -> str:
    """The training images: kind, number and licenses."""
    images = facts.images
    lines = [f"Images of the kind `{images['kind']}` at {images['size']} px, {images['channels']} channels."]
    if facts.counts:
        lines.append(" ".join(f"{side}: {count:,} images." for side, count in facts.counts.items()))
    if images["kind"] == "photos":
        return "\n".join(lines) + "\n\n" + photos(images)
    credits = {"demo": CREDIT, "fashion": "Fashion-MNIST by Zalando SE, MIT license."}
    unknown = "octaves does not know the licenses of these images: whoever publishes this model has to name them."
    return "\n".join([*lines, credits.get(images["kind"], unknown)])


def photos(images: dict[str, Any]) -> str:
    """Table of the packages that the photos come from, according to the index written by `octaves photos`."""
    config = ImagesConfig(kind="photos", size=images["size"], path=images.get("path"))
    path = photos_folder(config) / "index.json"
    if not path.is_file():
        return "Crops of photos from packages. Their index was missing at the export, so no licenses are listed."
    index = json.loads(path.read_text(encoding="utf-8"))
    pictures: Counter[tuple[str, str]] = Counter()
    crops: Counter[tuple[str, str, str]] = Counter()
    for side, members in index["pictures"].items():
        for key, picture in members.items():
            source = (key.split("/")[0], picture["license"])
            pictures[source] += 1
            crops[*source, side] += picture["crops"]
    rows = [
        [package, licence, f"{count:,}", f"{crops[package, licence, 'train']:,}", f"{crops[package, licence, 'val']:,}"]
        for (package, licence), count in sorted(pictures.items())
    ]
    head = ["Package", "License of its pictures", "Pictures", "Training crops", "Held-out crops"]
    return "Crops of the photos in these packages; no scene is in both splits.\n\n" + table(head, rows)


def training(facts: Facts) -> str:
    """Training steps and settings of both stages."""
    lines = []
    for name in ("tokenizer", "prior"):
        part = facts.config[name]
        if part is None:
            continue
        steps = part.get("steps")
        how = f"trained for {steps:,} steps" if steps else "not trained: a codec"
        lines.append(f"The {name} was {how}.")
        if settings := facts.config["training"].get(name):
            lines.append(f"\n```yaml\n{OmegaConf.to_yaml(OmegaConf.create(settings))}```\n")
        else:
            lines.append("The config of its run was not found beside the weights, so its settings are unknown.")
    return "\n".join(lines).strip()


def evaluation(facts: Facts) -> str:
    """The main table of the report, with the meaning and the limits of each number."""
    metrics = facts.metrics
    if metrics is None:
        return f"Not evaluated: {facts.why_not_measured}."
    settings = metrics["settings"]
    rows = [[row.name, f"**{row.value}**", row.beside, row.meaning] for row in rows_of(metrics)]
    lines = [
        f"{subtitle(metrics)}.",
        "",
        table(["Measure", "Value", "Beside", "Meaning"], rows),
        "",
        f"Images: {settings['choice_of_images']}. fd_lite0: {settings['fd_lite0']}; do not compare it with FID.",
        f"Measured with torch {settings['torch']} on {settings['device']}; {settings['precision']}.",
    ]
    if metrics.get("skipped"):
        lines += ["", "Not measured:", "", *(f"- {line}" for line in metrics["skipped"])]
    return "\n".join(lines)


def files(facts: Facts) -> str:
    """All files with their hashes."""
    return table(["File", "sha256"], [[name, f"`{value}`"] for name, value in sorted(facts.hashes.items())])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
