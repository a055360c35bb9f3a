"""Results of a study: all cells as CSV and JSON; means and spreads of the arms as Markdown and as a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot
from torch import nn

from data.files import write_atomically
from pipeline.compare import FIGURES, look_up
from pipeline.config import ConfigError
from pipeline.rates import COLOURS
from pipeline.report_tables import figure
from pipeline.studies.plan import Cell, StudyConfig
from pipeline.studies.train import Outcome, effort
from stages.weights import load_prior, load_tokenizer

TITLES = {known.key: known.title for known in FIGURES} | {
    "tokenizer.psnr_of_mean_error": "PSNR of the mean error, dB",
    "rate.entropy_bits_per_pixel": "Entropy of the codes, bits/px",
    "codes.*.perplexity": "Perplexity by scale",
    "codes.*.used": "Codes used by scale",
    "rate.scales.*.entropy_bits": "Entropy by scale, bits an image",
}
Value = float | tuple[float, ...] | None
"""One figure of one cell; a tuple if its key contains ``*``."""


def values_of(metrics: dict[str, Any], key: str) -> Value:
    """The value of a dotted key, where ``*`` stands for every entry of a list; None if it is missing."""
    before, star, after = key.partition(".*.")
    if not star:
        value = look_up(metrics, key)
        return None if value is None else number(value, key)
    entries = look_up(metrics, before) or []
    values = [look_up(entry, after) for entry in entries]
    return tuple(number(value, key) for value in values) if values and None not in values else None


def number(value: Any, key: str) -> float:
    """A number from ``metrics.json``. Raises ConfigError, naming the key, for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"figures: {key} is not a number in metrics.json; name one, e.g. tokenizer.fd_lite0.value")
    return float(value)


def write_tables(study: StudyConfig, name: str, cells: Sequence[Cell], outcome: Outcome, out: Path) -> Path:
    """Write ``cells.csv``, ``study.json``, ``table.md`` and ``plot.png`` to ``out``. Returns ``table.md``."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [row_of(study, cell, outcome) for cell in cells]
    text = markdown(study, name, rows)
    write_atomically(out / "cells.csv", csv_of(study, rows).encode())
    summary = {"study": name, "question": study.question, "cells": rows}
    write_atomically(out / "study.json", (json.dumps(summary, indent=1) + "\n").encode())
    write_atomically(out / "table.md", text.encode())
    draw(study, rows, out / "plot.png")
    return out / "table.md"


def row_of(study: StudyConfig, cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """Plain data of a cell: arm and seed, state (done, not run, failed: reason), figures and settings."""
    failed = outcome.reason(cell)
    done = failed is None and cell.metrics.exists()
    metrics = json.loads(cell.metrics.read_text(encoding="utf-8")) if done else {}
    tokenizer, prior = Path(cell.config.tokenizer.path), Path(cell.config.prior.path)
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "state": "done" if done else f"failed: {failed}" if failed else "not run",
        "command": shlex.join(("octaves", "eval", *cell.command)),
        "tokenizer_parameters": count(load_tokenizer(tokenizer)[0]) if tokenizer.exists() else None,
        "prior_parameters": count(load_prior(prior)[0]) if prior.exists() else None,
        "training": effort(cell),
        "figures": {key: values_of(metrics, key) for key in study.figures},
        "settings": {key: metrics["settings"].get(key) for key in ("tokenizer", "prior", "device", "threads", "torch")}
        if done
        else None,
    }


def count(network: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def csv_of(study: StudyConfig, rows: Sequence[dict[str, Any]]) -> str:
    """One line per cell; several values of one figure are separated by spaces."""
    text = io.StringIO()
    plain = ("arm", "seed", "state", "tokenizer_parameters", "prior_parameters")
    training = ("cpu_minutes", "peak_megabytes")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *training, *study.figures])
    for row in rows:
        values = [row["figures"][key] for key in study.figures]
        formatted = [" ".join(map(str, value)) if isinstance(value, tuple) else value for value in values]
        spent = [(row["training"] or {}).get(key) for key in training]
        writer.writerow([*(row[key] for key in plain), *spent, *formatted])
    return text.getvalue()


def spread(values: Sequence[Value]) -> str:
    """Mean ± sample standard deviation over seeds; no deviation for a single value; a dash without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if isinstance(known[0], tuple):
        if any(not isinstance(value, tuple) or len(value) != len(known[0]) for value in known):
            return "–"
        return ", ".join(spread(column) for column in zip(*known, strict=True))  # type: ignore[arg-type]
    mean = statistics.fmean(known)  # type: ignore[arg-type]
    return figure(mean) + (f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else "")  # type: ignore[type-var]


def markdown(study: StudyConfig, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table of arms as Markdown."""
    shown = [key for key in study.figures if any(row["figures"][key] is not None for row in rows)]
    head = ["arm", "seeds", "parameters", "CPU min", "peak MB", *(TITLES.get(key, key) for key in shown)]
    lines = [f"# {name}", "", study.question, "", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        arm_rows = [row for row in rows if row["arm"] == arm]
        done = [row for row in arm_rows if row["state"] == "done"]
        if not done:
            cells = [arm, "0", *["–"] * (len(head) - 3), arm_rows[0]["state"]]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        sizes = [row["tokenizer_parameters"] + (row["prior_parameters"] or 0) for row in done]
        efforts = [row["training"] for row in done if row["training"] is not None]
        minutes = f"{statistics.fmean(entry['cpu_minutes'] for entry in efforts):.1f}" if efforts else "–"
        peaks = [entry["peak_megabytes"] for entry in efforts if entry["peak_megabytes"] is not None]
        cells = [arm, str(len(done)), f"{sizes[0]:,}", minutes, f"{max(peaks):,.0f}" if peaks else "–"]
        cells += [spread([row["figures"][key] for row in done]) for key in shown]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [f"{row['arm']}, seed {row['seed']}: {row['state']}" for row in rows if row["state"] != "done"]
    lines += ["", "± is the sample standard deviation over seeds; one seed has none."]
    if missing:
        lines += ["", "Missing: " + "; ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def draw(study: StudyConfig, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot one panel per figure of ``study.plot``: a row of dots per arm, with a bar at the mean."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    plot = Plot(figsize=(4.4 * len(study.plot) + 1, 0.36 * len(arms) + 1.3), dpi=120, layout="constrained")
    panels = plot.subplots(1, len(study.plot), squeeze=False, sharey=True)[0]
    for axis, key in zip(panels, study.plot, strict=True):
        for number, arm in enumerate(arms):
            values = [row["figures"].get(key) for row in rows if row["arm"] == arm]
            known = [value for value in values if isinstance(value, float) and math.isfinite(value)]
            axis.plot(known, [number] * len(known), "o", color=COLOURS(number % 20), alpha=0.75, markersize=5)
            if known:
                axis.plot([statistics.fmean(known)], [number], "|", color="black", markersize=14)
        axis.set_title(TITLES.get(key, key), fontsize=9)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.grid(alpha=0.3)
    plot.savefig(path)
