"""Loss curves for the report, out of the TensorBoard files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Mid greys and colours that hold on white and on black: the page follows the reader's colour scheme.
INK = "#858585"
COLOURS = ("#3f7fbf", "#c9732c")
FIRST = ("loss/", "bits_per_token", "masked_bits_per_token", "psnr", "perceptual")
"""How the names of curves begin that are shown whatever they are of."""
MAX_PANELS = 12


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
        if name.startswith(FIRST) or "perplexity" in name:
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
            plain_axis(axis, "step")
        figure.savefig(path, transparent=True)


def plain_axis(axis: Any, below: str) -> None:
    """No frame and no paper: two thin lines, small numbers, and what stands ``below``."""
    axis.patch.set_alpha(0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(labelsize=7)
    axis.set_xlabel(below, fontsize=7)


def smoothed(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential average with the start's bias removed."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result
