"""The report's part about samples and held-out images as two sets of features, one line a backbone."""

from __future__ import annotations

from typing import Any

from pipeline.report_tables import bias, figure, heading, percent, same_backbone, table
from stages.measures.samples import frechet_key

FEATURES = {
    "lite0": "EfficientNet-Lite0's features (no FID)",
    "classifier": "the features of a classifier of the training images (no FID)",
    "fid": "Inception's features: FID",
}
"""What the last part of a Fréchet distance's key means."""


def spaces_part(metrics: dict[str, Any]) -> str:
    """Fréchet and kernel distance, precision, recall, density and coverage, each with real images in brackets."""
    samples = metrics.get("samples", {})
    names = [name for name in ("lite0", "classifier", "inception") if frechet_key(name) in samples]
    if not names:
        return ""
    rows = [row_of(name, frechet_key(name), samples) for name in names]
    if "sfd_lite0" in samples:
        rows.insert(1, row_of("lite0, with places", "sfd_lite0", samples))
    first = samples[frechet_key(names[0])]
    words = (
        f"{first['num_judged']:,} samples and {first['num_reference']:,} held-out images; in brackets as many training "
        "images instead of samples, the best to hope for. Kernel distance (KID in other features), mean and spread of "
        "subsets: unbiased, so it compares between N. Precision: share of samples near any held-out image (quality). "
        "Recall: share of held-out images near any sample (variety). Density: how many held-out images' neighbourhoods "
        "a sample lies in, over k. Coverage: share of held-out images with a sample in their neighbourhood: lost modes "
        "lower it. With places: features of an earlier map whose places are kept, as in sFID."
    )
    if f"manifold_{names[0]}" in samples:
        words += f" Neighbourhoods reach to neighbour {samples[f'manifold_{names[0]}']['k']}."
    words += f" Fréchet distances:{bias(first)}" if first["bias"] else ""
    flattered = [name for name in names if samples[frechet_key(name)]["same_backbone_as_loss"]]
    if flattered:
        words += f" {' and '.join(flattered)} (*):{same_backbone(samples[frechet_key(flattered[0])])}"
    head = ["Features", "Fréchet distance", "Kernel distance", "Precision", "Recall", "Density", "Coverage"]
    return heading("Samples as a set", words) + table(head, rows)


def row_of(title: str, key: str, samples: dict[str, Any]) -> list[str]:
    """One backbone's cells; a star marks what the tokenizer was trained against."""
    name = "" if key.startswith("sfd_") else title
    distance, real = samples[key], samples[f"{key}_of_real_images"]
    cells = [
        title + " *" * distance["same_backbone_as_loss"],
        f"{figure(distance['value'])} ({figure(real['value'])})",
    ]
    kernel, manifold, covered = (samples.get(f"{kind}_{name}") for kind in ("kd", "manifold", "coverage"))
    if kernel is None:
        cells.append("–")
    else:
        spread = f"{figure(kernel['mean'])} ± {figure(kernel['std'])}"
        cells.append(f"{spread} ({figure(kernel['baseline_of_real_images'])})")
    for kind in ("precision", "recall", "density"):
        if manifold is None:
            cells.append("–")
        else:
            shown = (lambda value: f"{value:.3f}") if kind == "density" else percent
            cells.append(f"{shown(manifold[kind])} ({shown(manifold['baseline_of_real_images'][kind])})")
    cells.append(
        "–" if covered is None else f"{percent(covered['value'])} ({percent(covered['baseline_of_real_images'])})"
    )
    return cells
