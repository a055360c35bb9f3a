"""The report's parts about lists: how long they are, what they hold, and images that were coloured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report_scales import caveats, distortion_cells
from pipeline.report_tables import heading, percent, section, table

COLOURED = {
    "coloured": "coloured",
    "gray": "gray",
    "mean_chroma": "mean chroma of the training images",
    "bound": "chroma of the decoded original",
    "original": "original",
}


def lists_part(metrics: dict[str, Any]) -> str:
    """Length of lists by scale, and by quality and size beside PSNR."""
    found = metrics.get("lists")
    if found is None:
        return ""
    quantiles = ", ".join(f"{share}: {value:.0f}" for share, value in found["quantiles"].items())
    words = f"Lists of {found['mean_length']:.1f} elements on average, with the end ({quantiles})."
    scales = [
        [scale["name"], f"{scale['elements']:.1f}", percent(scale["share"]), str(scale["share"])]
        for scale in found["scales"]
    ]
    scales += [
        [f"all of {plane['name']}", f"{plane['elements']:.1f}", percent(plane["share"]), str(plane["share"])]
        for plane in found["planes"]
        if len(found["planes"]) > 1
    ]
    tried = [
        [
            f"{entry['side']}x{entry['side']}, quality {entry['quality']}",
            f"{entry['mean_length']:.1f}",
            f"{entry['longest']:,}",
            f"{entry['mean_length'] / entry['side'] ** 2:.3f}",
            f"{entry['psnr_mean_of_images']:.2f}",
        ]
        for entry in found["tried"]
    ]
    return "".join(
        (
            heading("Lists", words),
            table(["Scale", "Elements", "Share", ""], scales, share_last=True),
            '<p class="soft">Some of the same images at other qualities, and reduced by averaging.</p>',
            table(["Images", "Elements", "Longest", "Elements a pixel", "PSNR, dB"], tried),
        )
    )


def colouring_part(metrics: dict[str, Any], folder: Path) -> str:
    """Coloured images beside gray ones and those of mean chroma."""
    found = metrics.get("colouring")
    if found is None:
        return ""
    words = (
        f"The luma of {found['num_images']:,} held-out images, coloured by the prior. A colour is one of many that are "
        "likely, so the error of chroma favours the mean; how saturated images are, how much they differ in colour, "
        "and the Fréchet distance do not." + caveats(found["rows"]["coloured"])
    )
    rows = [
        [
            COLOURED[name],
            f"{entry['chroma_error']:.2f}",
            f"{entry['saturation']:.2f}",
            f"{entry['chroma_spread']:.2f}",
            *distortion_cells(entry),
        ]
        for name, entry in found["rows"].items()
    ]
    head = ["Colours", "Error of chroma", "Saturation", "Spread", "PSNR, dB", "Perceptual", "fd_lite0"]
    return section("Colouring", words, folder / "colouring.png") + table(head, rows)
