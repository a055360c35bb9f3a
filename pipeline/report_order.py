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
    """One panel a subject over the position of the token, as a transparent PNG."""
    causality, bits, gains = found["causality"], found["bits_by_position"], found.get("gains")
    panels: list[tuple[str, dict[str, list[float]]]] = []
    if gains is not None:
        panels.append(("gain of each token, dB", {"": gains["gain"]}))
        panels.append(("perplexity of each token", {"": found["perplexity_by_position"]}))
    curves = {
        f"{name}, mean {causality[name]['mean_r2']:.3f}": causality[name]["r2"] for name in ("natural", "reversed")
    }
    panels.append(("R² from earlier tokens", {**curves, "shuffled": causality["natural"]["r2_shuffled"]}))
    if bits is not None:
        ordered = bits[::-1] if found["prior_order"] == "reversed" else bits
        panels.append((f"prior ({found['prior_order']}), bits", {"": ordered}))
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(3.6 * len(panels), 2.7), dpi=110, layout="constrained")
        for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for index, (name, values) in enumerate(lines.items()):
                first = causality["tokens"] - len(values) + 1  # nothing stands before the first token
                places = range(first, first + len(values))
                if "gain" in title:
                    axis.bar(places, values, color=[COLOURS[0] if value > 0 else LOST for value in values], width=1)
                    axis.set_yscale("symlog", linthresh=0.1)
                else:
                    axis.plot(places, values, color=[*COLOURS, INK][index], linewidth=1.3, label=name)
            axis.set_title(title, fontsize=9)
            if len(lines) > 1:
                axis.legend(fontsize=7, frameon=False)
            plain_axis(axis, "token")
        figure.savefig(path, transparent=True)


def order_part(metrics: dict[str, Any], folder: Path) -> str:
    """The panels, and what they add up to."""
    found = metrics.get("order")
    if found is None:
        return ""
    causality, gains = found["causality"], found.get("gains")
    words = (
        f"R²: how well the code of a token follows linearly from the codes of all earlier ones, on {held(causality)} "
        "of the images that the regression has not seen; shuffled: from the tokens of another image."
    )
    if gains is not None:
        words += (
            f" Gain: PSNR against {gains['num_images']} images with the token, less that without it; "
            f"{gains['not_above_zero']} of {len(gains['gain'])} tokens add nothing."
        )
    rows = [
        [name, f"{causality[name]['mean_r2']:.3f}", f"{causality[name]['mean_r2_shuffled']:.3f}"]
        for name in ("natural", "reversed")
    ]
    return section("Order of tokens", words, folder / "tokens.png") + table(["Order", "Mean R²", "Shuffled"], rows)


def held(causality: dict[str, Any]) -> int:
    """Images on which R² was measured."""
    count = causality["num_images"]
    return int(count - count // 2 - count // 4)
