"""The report's part about calibration: whether the prior's probabilities mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.report_curves import COLOURS, INK, plain_axis
from pipeline.report_tables import MOST_ROWS, percent, section, table


def draw_calibration(found: dict[str, Any], path: Path) -> None:
    """Accuracy over confidence, and both by position, as a transparent PNG."""
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(7.4, 3.0), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        bins = found["bins"]
        most = max(*bins["confidence"], *bins["accuracy"])
        left.plot([0, most], [0, most], color=INK, linewidth=0.8)
        left.plot(bins["confidence"], bins["accuracy"], "o-", color=COLOURS[0], markersize=3.5, linewidth=1.2)
        error = found["expected_calibration_error"]
        left.set_title(f"accuracy of the likeliest id (error {error:.4f})", fontsize=9)
        plain_axis(left, "its probability")
        places = range(1, len(found["confidence_by_position"]) + 1)
        dots = "." * (len(places) < 3)
        for name, colour in (("confidence", COLOURS[0]), ("accuracy", COLOURS[1])):
            values = found[f"{name}_by_position"]
            right.plot(places, values, color=colour, linewidth=1.2, label=name, marker=dots)
        right.set_title("by position", fontsize=9)
        right.legend(fontsize=7, frameon=False)
        plain_axis(right, "token")
        figure.savefig(path, transparent=True)


def calibration_part(metrics: dict[str, Any], folder: Path) -> str:
    """The plots, and the error of every scale."""
    found = metrics.get("calibration")
    if found is None:
        return ""
    words = (
        f"Of the tokens of {found['num_images']:,} held-out images: the probability that the prior gives to its "
        "likeliest id, beside how often that id comes. On the line it is calibrated, under it overconfident. Bins of "
        "equal count; a scale of few tokens has a larger error by chance."
    )
    scales = found["scales"]
    if len(scales) > MOST_ROWS:
        kept = {entry["num_scales"] for entry in metrics["tokenizer"]["prefixes"]}
        scales = [scale for number, scale in enumerate(scales, 1) if number in kept]
    rows = [
        [
            scale["scale"],
            percent(scale["confidence"]),
            percent(scale["accuracy"]),
            f"{scale['expected_calibration_error']:.4f}",
        ]
        for scale in scales
    ]
    head = ["Scale", "Mean probability", "Right", "Expected calibration error"]
    return section("Calibration of the prior", words, folder / "calibration.png") + table(head, rows)
