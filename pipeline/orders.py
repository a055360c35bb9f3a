"""orders: compare how well tokens are predicted from those before them, over evaluations of the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.own_keys import OrdersRequest
from pipeline.rates import COLOURS, read_metrics
from pipeline.report_order import bits_in_order, measured_orders


def compare_orders(config: Config, request: OrdersRequest) -> Path:
    """Write ``orders.json`` and ``orders.png``: R² and bits of the prior by position. Returns the path of the plot.

    Every evaluation contributes the natural order of its tokens and the reversed order (only R²). If its prior has
    another order, this is added with its bits, except for prior.order=scale, which is not an order of single tokens.
    Raises RunError for an evaluation that is missing, of other images, or without a measured order.
    """
    names = list(filter(None, (part.strip() for part in request.runs.split(","))))
    if not names:
        raise RunError("runs= is empty; give evaluation folders, comma-separated")
    rows = ranked([row for name in names for row in rows_of_run(Path(name), config)])
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "orders.json").write_text(json.dumps({"orders": rows}, indent=1) + "\n", encoding="utf-8")
    draw_orders(rows, out / "orders.png")
    print(f"{'order':44s} {'mean R²':>8s} {'shuffled':>9s} {'bits a token':>13s} {'bits/px':>8s} {'PSNR':>7s}")
    for row in rows:
        bits, rate = ("–" if row[key] is None else f"{row[key]:.3f}" for key in ("bits_per_token", "bits_per_pixel"))
        print(
            f"{row['name']:44s} {row['mean_r2']:8.3f} {row['mean_r2_shuffled']:9.3f} {bits:>13s} {rate:>8s} "
            f"{row['psnr']:7.2f}" + " (R²: too few images)" * row["too_few_images"]
        )
    print(f"wrote {out / 'orders.json'} and {out / 'orders.png'}")
    return out / "orders.png"


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rows by mean R², best first. Drops duplicates (same tokens and order), but no rows with bits of a prior."""

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one["tokenizer_sha256"] == other["tokenizer_sha256"] and one["order"] == other["order"]

    kept = [
        row
        for number, row in enumerate(rows)
        if row["bits_per_token"] is not None
        or not any(
            same(row, other) and (other["bits_per_token"] is not None or position < number)
            for position, other in enumerate(rows)
        )
    ]
    return sorted(kept, key=lambda row: -float(row["mean_r2"]))


def rows_of_run(folder: Path, config: Config) -> list[dict[str, Any]]:
    """One row per order of the tokens of a run. Raises RunError like ``compare_orders``."""
    metrics = read_metrics(folder, config)
    measured = metrics.get("order")
    if measured is None or measured["causality"] is None:
        raise RunError(f"{folder}: the order of its tokens was not measured (streams, lists or too few images)")
    settings, causality, rows = metrics["settings"], measured["causality"], []
    orders = measured_orders(causality)
    for order in orders:
        has_bits = measured["bits_by_position"] is not None and measured["prior_order"] == order
        bits = bits_in_order(measured) if has_bits else None
        rows.append(
            {
                "name": f"{folder.parent.parent.name}/{folder.name}, {order}",
                "order": order,
                "tokenizer_sha256": settings["tokenizer"]["sha256"],
                **{key: value for key, value in causality.items() if key not in orders},
                **causality[order],
                "bits_by_position": bits,
                "bits_per_token": None if bits is None else sum(bits) / len(bits),
                "bits_per_pixel": None if bits is None else sum(bits) / settings["config"]["images"]["size"] ** 2,
                "psnr": metrics["tokenizer"]["psnr_mean_of_images"],
            }
        )
    return rows


def draw_orders(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot both curves of every order over the fraction of tokens before."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, row in enumerate(rows):
        colour = COLOURS(index % 20)
        count = row["tokens"]
        places = [position / count for position in range(1, count)]
        left.plot(places, row["r2"], color=colour, label=f"{row['name']}: {row['mean_r2']:.3f}")
        left.plot(places, row["r2_shuffled"], ":", color=colour, linewidth=0.8)
        if row["bits_by_position"] is not None:
            places = [position / count for position in range(count)]
            label = f"{row['name']}: {row['bits_per_token']:.2f} a token"
            right.plot(places, row["bits_by_position"], color=colour, label=label)
    left.set_title("R² of a token's code from the codes before it (dotted: shuffled)", fontsize=9)
    right.set_title("the prior's bits", fontsize=9)
    for axis in (left, right):
        axis.set_xlabel("share of the tokens before")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(path)
