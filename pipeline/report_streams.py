"""The report's parts about streams: their grammar, rate and distortion, growing and finished images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report_tables import heading, percent, section, table


def streams_part(metrics: dict[str, Any]) -> str:
    """Lengths, what the grammar saves, and rate beside distortion for every number of scales."""
    found = metrics.get("streams")
    if found is None:
        return ""
    words = (
        f"Streams of {found['mean_length']:.1f} tokens on average, {found['longest']:,} at most. An image costs "
        f"{found['uniform_bits']:.0f} bits where every token that may come is as likely, {found['header_bits']:.2f} of "
        f"them for the header, and {found['uniform_bits_saved']:.1f} more if tokens were allowed that those before "
        "make impossible."
    )
    if found.get("prior_bits") is not None:
        words += (
            f" Under the prior it costs {found['prior_bits']:.0f} bits, {found['prior_bits_saved']:.2f} more without "
            "that rule."
        )
    if "cut_share" in found:
        words += (
            f" The network itself gives {found['illegal_probability']:.2%} to tokens that cannot come; "
            f"{percent(found['cut_share'])} of the streams are longer than it models."
        )
    rows = [
        [
            entry["name"],
            f"{entry['tokens']:.1f}",
            f"{entry['uniform_bits_per_pixel']:.3f}",
            f"{entry['prior_bits_per_pixel']:.3f}" if "prior_bits_per_pixel" in entry else "–",
            "–" if entry["psnr_mean_of_images"] is None else f"{entry['psnr_mean_of_images']:.2f}",
        ]
        for entry in found["prefixes"]
    ]
    head = ["Up to", "Tokens", "Bits/px, uniform", "under the prior", "PSNR, dB"]
    return heading("Streams", words) + table(head, rows)


def growing_part(folder: Path) -> str:
    """Samples and their beginnings, held-out images and other ends of them, and grids with other settings."""
    parts = [
        section("Growing samples", "New samples, of which ever more is decoded.", folder / "growing.png"),
        section(
            "Finished images",
            "The beginning of a held-out image's tokens (named at the left) and three ends that the prior gave it.",
            folder / "finished.png",
        ),
    ]
    for picture in sorted(folder.glob("samples_*.png")):
        setting = picture.stem.removeprefix("samples_")
        parts.append(section(f"Samples with {setting}", "Not selected: the first of every class.", picture))
    return "".join(parts)
