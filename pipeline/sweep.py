"""sweep: sample from one prior with a grid of settings, and measure each point with the metrics of ``eval``.

All points use the same prompts, seeds and reference images, so they differ only in the settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data.images.sources import open_source
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.evaluate import check_classes, check_parts, fit_classifier, load_inception, load_judge, settings
from pipeline.evaluate_samples import Judges, ask, class_accuracy, draw
from pipeline.evaluation_images import read_images
from pipeline.models import assemble
from pipeline.own_keys import SweepRequest
from pipeline.placement import device_of
from pipeline.rates import COLOURS
from pipeline.report_tables import figure, percent
from pipeline.requests import parse_numbers
from pipeline.run import need
from stages.measures.samples import frechet_key
from stages.prior.sampling import SamplingConfig
from stages.weights import check_pair, load_prior, load_tokenizer


def sweep(config: Config, request: SweepRequest) -> Path:
    """Sample ``eval.num_samples`` images at every point of the grid, measure them, and write a table and a plot.

    Returns the folder. Before any work, raises RunError, ConfigError or InputError for a point that cannot be sampled,
    and for parts that are missing or do not belong together.
    """
    # no comparison with another tokenizer here
    config.eval = dataclasses.replace(config.eval, baseline=None)
    tokenizer_path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    prior_path = need(config.prior.path, "prior", "train-prior", config)
    tokenizer, metadata = load_tokenizer(tokenizer_path)
    check_parts(config, tokenizer, tokenizer_path)
    prior, prior_metadata = load_prior(prior_path)
    check_pair(prior_metadata, prior_path, tokenizer_path)
    models = assemble(config, tokenizer, prior)
    points = grid_of(config, request)
    for point in points:
        models.check(point)
    source = open_source(config.images, "val")
    check_classes(models, source)
    skipped: list[str] = []
    device = device_of(config)
    val = read_images(source, config.images, config.eval.num_images)
    train_source = open_source(config.images, "train")
    train = read_images(train_source, config.images, config.eval.num_train_reference, small=True)
    judges = Judges(
        load_judge(metadata.get("perceptual", config.tokenizer_training.perceptual), device, skipped),
        fit_classifier(config, train, len(source.class_names), device, skipped),
        load_inception(config, device, skipped),
    )
    clean = read_images(train_source, config.images, config.eval.num_samples).pixels
    spaces = judges.spaces(val.pixels, clean)
    if not spaces:
        raise RunError(f"the samples cannot be measured: {'; '.join(skipped)}")
    prompts = ask(config, models, val, len(source.class_names))
    entries = []
    for point in points:
        drawn = draw(models, prompts, point)
        entry: dict[str, Any] = {
            "guidance": point.guidance,
            "temperature": point.temperature[0] if len(point.temperature) == 1 else point.temperature,
            "top_k": point.top_k[0] if len(point.top_k) == 1 else point.top_k,
            "seconds": drawn.seconds,
        }
        for space in spaces.values():
            entry |= space.measure(space.features(drawn.pixels), config.eval.neighbours, config.eval.seed)
        if judges.classifier is not None and prompts.conditional:
            entry["class_accuracy"] = class_accuracy(judges.classifier, prompts, drawn.pixels)
        entries.append(entry)
        print(" · ".join(f"{title} {cell}" for title, cell in cells_of(entry).items()), flush=True)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": settings(config, tokenizer_path, metadata["kind"], device),
        "num_samples": len(prompts.seeds),
        "num_reference": len(val),
        "prompts": prompts.by,
        "seeds": [prompts.seeds[0], prompts.seeds[-1]],
        "sampling": to_plain(config.sampling),
        "points": entries,
        "skipped": skipped,
    }
    (out / "sweep.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "sweep.md").write_text(markdown(config.name, result), encoding="utf-8")
    draw_sweep(entries, out / "sweep.png")
    print(f"wrote {out / 'sweep.json'}, {out / 'sweep.md'} and {out / 'sweep.png'}")
    return out


def grid_of(config: Config, request: SweepRequest) -> list[SamplingConfig]:
    """All combinations of the request's values; guidance changes fastest. Raises RunError for invalid numbers."""
    own = config.sampling
    guidances = parse_numbers(request.guidances, "guidances", float) if request.guidances else [own.guidance]
    temperatures: list[list[float]] = [own.temperature]
    if request.temperatures:
        temperatures = [[value] for value in parse_numbers(request.temperatures, "temperatures", float)]
    top_ks: list[list[int]] = [own.top_k]
    if request.top_ks:
        top_ks = [[value] for value in parse_numbers(request.top_ks, "top_ks")]
    return [
        dataclasses.replace(own, guidance=guidance, temperature=temperature, top_k=top_k)
        for temperature, top_k, guidance in itertools.product(temperatures, top_ks, guidances)
    ]


def cells_of(point: dict[str, Any]) -> dict[str, str]:
    """One row of the table as {title: cell}; a star marks a backbone that the tokenizer was trained with."""
    cells = {
        "guidance": f"{point['guidance']:g}",
        "temperature": str(point["temperature"]),
        "top-k": str(point["top_k"]),
    }
    for name in ("lite0", "classifier", "inception"):
        if frechet_key(name) not in point:
            continue
        star = " *" * point[frechet_key(name)]["same_backbone_as_loss"]
        cells[frechet_key(name) + star] = figure(point[frechet_key(name)]["value"])
        if f"kd_{name}" in point:
            cells[f"kd_{name}{star}"] = figure(point[f"kd_{name}"]["mean"])
        if f"manifold_{name}" in point:
            cells |= {f"{kind} ({name})": percent(point[f"manifold_{name}"][kind]) for kind in ("precision", "recall")}
    if "class_accuracy" in point:
        cells["class accuracy"] = percent(point["class_accuracy"]["balanced"])
    return cells


def markdown(name: str, result: dict[str, Any]) -> str:
    """The table as Markdown, with what its values depend on."""
    points = result["points"]
    rows = [cells_of(point) for point in points]
    first = next(point[key] for point in points for key in point if key.startswith(("fd_", "fid")))
    lines = [
        f"# {name}: sampling settings",
        "",
        f"{result['num_samples']:,} samples a point (seeds {result['seeds'][0]} to {result['seeds'][1]}; prompts: "
        f"{result['prompts']}) against {result['num_reference']:,} held-out images. Fréchet and kernel distance: lower "
        "is better.",
    ]
    if first["bias"]:
        lines += ["", f"Fréchet distances: {first['bias']}."]
    if any("*" in title for title in rows[0]):
        lines += ["", "\\* The tokenizer's loss used the same network, which flatters it."]
    lines += ["", f"| {' | '.join(rows[0])} |", f"|{' ---: |' * len(rows[0])}"]
    lines += [f"| {' | '.join(row.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw_sweep(points: list[dict[str, Any]], path: Path) -> None:
    """Plot Fréchet distance over guidance: one line per temperature and top-k, one panel per backbone."""
    keys = [key for key in ("fd_lite0", "fd_classifier", "fid") if key in points[0]]
    plot = Figure(figsize=(5.2 * len(keys), 3.9), dpi=120, layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault(f"temperature {point['temperature']}, top-k {point['top_k']}", []).append(point)
    for axis, key in zip(plot.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (name, members) in enumerate(lines.items()):
            ordered = sorted(members, key=lambda point: point["guidance"])
            values = [point[key]["value"] for point in ordered]
            axis.plot([point["guidance"] for point in ordered], values, "o-", color=COLOURS(number % 20), label=name)
        real = points[0][f"{key}_of_real_images"]["value"]
        axis.axhline(real, color="0.5", linestyle=":", label="training images instead")
        axis.set_title(key, fontsize=9)
        axis.set_xlabel("guidance")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    plot.savefig(path)
