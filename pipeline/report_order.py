"""The report's part about the order of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.report_curves import COLOURS, INK, plain_axis
from pipeline.report_tables import section, table

LOST = "#b8433f"


def draw_order(found: dict[str, Any], path: Path) -> None:
    """One panel a subject over the position of the token, as a transparent PNG; no file where nothing was measured."""
    causality, bits, gains = found["causality"], found["bits_by_position"], found["gains"]
    panels: list[tuple[str, dict[str, list[float]]]] = []
    if gains is not None:
        panels.append(("perplexity of each token", {"": found["perplexity_by_position"]}))
    if causality is not None:
        names = measured_orders(causality)
        curves = {f"{name}, mean {causality[name]['mean_r2']:.3f}": causality[name]["r2"] for name in names}
        panels.append(("R² from earlier tokens", {**curves, "shuffled": causality["natural"]["r2_shuffled"]}))
    if bits is not None:
        panels.append((f"prior ({found['prior_order']}), bits", {"": bits_in_order(found)}))
    count = len(panels) + (gains is not None)
    if not count:
        return
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(3.6 * count, 2.7), dpi=110, layout="constrained")
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        if gains is not None:
            axis, values = axes.pop(0), gains["gain"]
            colours = [COLOURS[0] if value > 0 else LOST for value in values]
            axis.bar(range(1, len(values) + 1), values, color=colours, width=1)
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_title("gain of each token, dB", fontsize=9)
            plain_axis(axis, "token")
        for axis, (title, lines) in zip(axes, panels, strict=True):
            for colour, (name, values) in zip((*COLOURS, INK), lines.items(), strict=False):
                first = found["tokens"] - len(values) + 1  # nothing stands before the first token
                axis.plot(range(first, first + len(values)), values, color=colour, linewidth=1.3, label=name)
            axis.set_title(title, fontsize=9)
            if len(lines) > 1:
                axis.legend(fontsize=7, frameon=False)
            plain_axis(axis, "token")
        figure.savefig(path, transparent=True)


def measured_orders(causality: dict[str, Any]) -> list[str]:
    """The orders whose R² was measured."""
    return [name for name, value in causality.items() if isinstance(value, dict)]


def bits_in_order(found: dict[str, Any]) -> list[float]:
    """The prior's bits in the order in which it models the tokens."""
    bits: list[float] = found["bits_by_position"]
    if found["prior_order"] == "natural":
        return bits
    # evaluations from before there were more orders name no permutation
    return [bits[element] for element in found.get("permutation") or reversed(range(len(bits)))]


def order_part(metrics: dict[str, Any], folder: Path) -> str:
    """The panels, and what they add up to."""
    found = metrics.get("order")
    if found is None:
        return ""
    causality, gains, words, rows = found["causality"], found["gains"], "By the place of the token.", []
    if causality is not None:
        words += (
            " R²: how well the code of a token follows linearly from the codes of all earlier ones, on "
            f"{causality['num_measured']:,} images that the regression has not seen; shuffled: from the tokens of "
            "another image."
        )
        words += " Too few images for so many numbers: it is lower than it should be." * causality["too_few_images"]
        rows = [
            [name, f"{causality[name]['mean_r2']:.3f}", f"{causality[name]['mean_r2_shuffled']:.3f}"]
            for name in measured_orders(causality)
        ]
    if gains is not None:
        words += (
            f" Gain: PSNR against {gains['num_images']} images with the token, less that without it; "
            f"{gains['not_above_zero']} of {len(gains['gain'])} tokens add nothing."
        )
    part = section("Order of tokens", words, folder / "tokens.png")
    return part + (table(["Order", "Mean R²", "Shuffled"], rows) if rows else "")
