"""The report's part about frequencies: which of them every number of scales carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.report_curves import INK, plain_axis
from pipeline.report_tables import section, table

LOWEST = -40
"""dB under which the plot is cut."""


def draw_frequencies(found: dict[str, Any], path: Path) -> None:
    """Power over the images' by frequency, a line a prefix, dotted what it should be; a transparent PNG."""
    rows = found["rows"]
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(7.4, 3.4), dpi=110, layout="constrained")
        axis = figure.subplots()
        axis.axhline(0, color=INK, linewidth=0.8)
        for number, row in enumerate(rows):
            # both ends of the colour map are hard to see on one of the page's two colours
            colour = colormaps["viridis"](0.15 + 0.7 * number / max(1, len(rows) - 1))
            for key, style in (("wanted", ":"), ("decoded", "-")):
                cycles = range(1, len(row[key]) + 1)
                label = row["name"] if key == "decoded" else None
                axis.plot(
                    cycles, row[key], style, color=colour, linewidth=1.4, label=label, marker="." * (len(cycles) < 3)
                )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        lowest = min(min(row[key]) for row in rows for key in ("decoded", "wanted"))
        axis.set_ylim(max(LOWEST, lowest - 1), None)
        axis.set_title("power over the images', dB (dotted: what these scales should carry)", fontsize=9)
        plain_axis(axis, "cycles a side")
        axis.legend(fontsize=7, frameon=False)
        figure.savefig(path, transparent=True)


def frequencies_part(metrics: dict[str, Any], folder: Path) -> str:
    """The plot, and the same by octaves."""
    found = metrics.get("spectrum")
    if found is None:
        return ""
    words = (
        "Radially averaged power of the reconstructions over that of the images (Hann window), in dB: 0 where they are "
        "as strong, negative where detail is lost. In brackets: what these scales should carry, by the tokenizer's own "
        "reference; where that is the image reduced to their size, averaging takes some dB of its last frequencies. "
        "Rounding to 8 bits keeps what is lost altogether from falling further than some -30 dB."
    )
    octaves = found["octaves_from"]
    rows = []
    for row in found["rows"]:
        pairs = list(zip(row["decoded_octaves"], row["wanted_octaves"], strict=True))
        cells = [f"{decoded:+.1f} ({wanted:+.1f})" for decoded, wanted in pairs]
        rows.append([row["name"], *cells, *["–"] * (len(octaves) - len(cells))])
    reach = len(found["images"])
    ends = [min(2 * start - 1, reach) for start in octaves]
    head = [f"{start}" if start == end else f"{start}–{end}" for start, end in zip(octaves, ends, strict=True)]
    return section("Frequencies", words, folder / "frequencies.png") + table(["Scales · cycles a side", *head], rows)
