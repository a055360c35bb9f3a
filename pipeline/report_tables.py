"""Pictures and tables of the report as HTML; what was not measured gives no text."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

PLOTS = ("curves.png", "tokens.png", "frequencies.png", "calibration.png", "errors.png")
"""Pictures that may shrink with the page; sheets of images keep their pixels."""
MOST_ROWS = 16
"""Rows of the table of codes; of more scales only those are shown whose prefixes are."""


def same_backbone(entry: dict[str, Any]) -> str:
    """A warning where the judge also was the teacher."""
    return " The tokenizer's loss used the same network, which flatters it." if entry["same_backbone_as_loss"] else ""


def bias(entry: dict[str, Any]) -> str:
    """A warning where a Fréchet distance has too few images."""
    return f" {entry['bias']}." if entry["bias"] else ""


def heading(title: str, words: str) -> str:
    """A heading and a sentence."""
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(words)}</p>'


def section(title: str, words: str, picture: Path) -> str:
    """A heading, a sentence and a picture; nothing where there is no picture."""
    if not picture.exists():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode("ascii")
    kind = "plot" if picture.name in PLOTS else "sheet"
    image = f'<img class="{kind}" alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f'{heading(title, words)}<div class="wide">{image}</div>'


def table(head: list[str], rows: list[list[str]], share_last: bool = False) -> str:
    """A table of text cells; with ``share_last`` the last cell is a share in [0, 1], shown as a bar."""
    lines = []
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if share_last:
            cells[-1] = f'<td class="bars"><span class="bar" style="width:{100 * float(row[-1]):.1f}%"></span></td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="figures{" barred" * share_last}">{inner}</table></div>'


def distortion_cells(entry: dict[str, Any]) -> list[str]:
    """PSNR, perceptual distance and fd_lite0; dashes for what was not measured."""
    perceptual, distance = entry.get("perceptual_lite0"), entry.get("fd_lite0")
    return [
        f"{entry['psnr_mean_of_images']:.2f}",
        "–" if perceptual is None else f"{perceptual['mean']:.3f}",
        "–" if distance is None else f"{distance['value']:.1f}",
    ]


def caveats(entry: dict[str, Any]) -> str:
    """What to know of fd_lite0 before comparing it; nothing where it was not measured."""
    found = entry.get("fd_lite0")
    return "" if found is None else (f" fd_lite0:{bias(found)}" if found["bias"] else "") + same_backbone(found)


def prefix_table(metrics: dict[str, Any]) -> str:
    """Distortion of every prefix of scales, and PSNR of those as large as the image against it."""
    found = metrics["tokenizer"]["prefixes"]
    if not found:
        return ""
    head = ["Scales", "Image", "PSNR, dB", "Perceptual", "fd_lite0", "SSIM"]
    rows = []
    several = sum("psnr_against_images" in entry for entry in found) > 1  # of one alone it is the same figure
    for entry in found:
        similar, whole = entry.get("ssim"), entry.get("psnr_against_images")
        row = [str(entry["num_scales"]), "x".join(map(str, entry["image_size"])), *distortion_cells(entry)]
        row.append("–" if similar is None else f"{similar:.3f}")
        rows.append(row + ["–" if whole is None else f"{whole:.2f}"] * several)
    words = f"Each prefix against what its scales should look like.{caveats(found[-1])}"
    return f'<p class="soft">{escape(words)}</p>' + table(head + ["Against the original, dB"] * several, rows)


def class_table(metrics: dict[str, Any]) -> str:
    """Class accuracy of samples and held-out images."""
    samples = metrics.get("samples", {})
    if "class_accuracy" not in samples:
        return ""
    names = samples["classifier"]["class_names"]
    pairs = zip(
        names, samples["class_accuracy"]["per_class"], samples["classifier"]["held_out"]["per_class"], strict=True
    )
    rows = [[name, percent(drawn), percent(real)] for name, drawn, real in pairs]
    return table(["Class", "Samples in class", "Held-out images in class"], rows)


def figure(value: float) -> str:
    """A number in four digits, without exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share as text; a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def code_table(metrics: dict[str, Any]) -> str:
    """Use of codes and rate per scale."""
    prior = {scale["scale"]: scale for scale in metrics["rate"]["scales"]}
    rows = []
    uses = metrics["codes"]
    shown = {entry["num_scales"] for entry in metrics["tokenizer"]["prefixes"]}
    if len(prior) > MOST_ROWS:
        kept = {scale for number, scale in enumerate(prior, 1) if number in shown}
        uses = [use for use in uses if use["scale"] in kept]
    for use in uses:
        bits = prior[use["scale"]]["prior_bits"]
        rows.append(
            [
                use["scale"] if len({u["field"] for u in metrics["codes"]}) == 1 else f"{use['scale']}, {use['field']}",
                f"{use['num_tokens']:,}",
                f"{use['used']:,} of {use['vocabulary_size']:,}",
                f"{use['perplexity']:.1f}",
                "–" if bits is None else f"{bits / prior[use['scale']]['tokens_per_image']:.2f}",
                str(use["share"]),
            ]
        )
    words = (
        "Codes that occur among the held-out images' tokens, and their perplexity: the number of codes that equal use "
        "would need. No more codes than tokens can occur."
    )
    head = ["Scale", "Tokens", "Codes used", "Perplexity", "Prior, bits a token", "Share used"]
    return heading("Codes", words) + table(head, rows, share_last=True) + joint_table(metrics, shown)


def joint_table(metrics: dict[str, Any], shown: set[int]) -> str:
    """Joint entropy of the fields per scale; nothing where elements have one. Of many scales those ``shown``."""
    uses = list(enumerate(metrics.get("joint_codes", []), 1))
    if not uses:
        return ""
    if len(uses) > MOST_ROWS:
        uses = [(number, use) for number, use in uses if number in shown]
    rows = [
        [
            use["scale"],
            f"{use['used']:,}",
            f"{use['field_bits']:.2f}",
            "too few tokens" if use["too_few_tokens"] else f"{use['entropy_bits']:.2f}",
        ]
        for _, use in uses
    ]
    words = (
        "All fields of a token together: combinations that occur, and the bits of a token without a model, field by "
        "field and jointly. Rates by entropy above are summed over fields."
    )
    head = ["Scale", "Combinations", "Entropy of the fields, bits", "Joint entropy, bits"]
    return f'<p class="soft">{escape(words)}</p>' + table(head, rows)
