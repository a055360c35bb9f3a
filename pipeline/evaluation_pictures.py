"""The pictures of an evaluation, one PNG a subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.reading import pixels_of
from data.images.source import ImageSource
from data.images.views import to_uint8
from data.layout import TokenLayout, Tokens
from pipeline.report_curves import INK
from stages.contract import Tokenizer
from stages.measures.distortion import psnr
from stages.measures.neighbours import nearest
from stages.measures.pictures import error_picture, sheet

NUM_SHOWN = 10
"""Images in a row of a sheet."""
MAX_CLASSES_SHOWN = 20


def prefix_name(layout: TokenLayout, num_scales: int) -> str:
    """What the first scales decode to, in a few letters: their size, or the last one's name where all sizes are one."""
    last = layout.scales[num_scales - 1]
    same = len({scale.image_size for scale in layout.scales}) == 1
    return last.name if same else f"{num_scales} ({last.image_size[1]} px)"


def show_reconstructions(folder: Path, pixels: Tensor, decoded: Tensor) -> None:
    """Originals, reconstructions and what differs."""
    original, made = pixels[:NUM_SHOWN], decoded[:NUM_SHOWN]
    rows = (original, made, error_picture(made, original))
    sheet(rows, ("original", "decoded", "error x4")).save(folder / "reconstructions.png")


def show_extremes(folder: Path, pixels: Tensor, decoded: Tensor) -> None:
    """The images that the tokenizer keeps worst and best, by PSNR, with what differs."""
    error = torch.cat([psnr(a, b) for a, b in zip(decoded.split(256), pixels.split(256), strict=True)])
    order = error.argsort()
    count = min(NUM_SHOWN, len(order) // 2)
    if not count:
        return
    rows: list[Tensor] = []
    labels: list[str] = []
    for name, chosen in (("worst", order[:count]), ("best", order.flip(0)[:count])):
        low, high = sorted((float(error[chosen[0]]), float(error[chosen[-1]])))
        original, made = pixels[chosen], decoded[chosen]
        rows += [original, made, error_picture(made, original)]
        labels += [f"{name}: {low:.1f} to {high:.1f} dB", "decoded", "error x4"]
    sheet(rows, labels).save(folder / "extremes.png")


def show_errors(folder: Path, pixels: Tensor, decoded: Tensor) -> None:
    """Where in the frame the tokenizer errs: root mean squared error of every place over all images and channels."""
    total = torch.zeros(pixels.shape[-2:], dtype=torch.float64)
    for a, b in zip(decoded.split(256), pixels.split(256), strict=True):
        total += (a.double() - b.double()).square().mean(1).sum(0)
    with matplotlib.rc_context({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}):
        figure = Figure(figsize=(3.9, 3.1), dpi=110, layout="constrained")
        axis = figure.subplots()
        shown = axis.imshow((total / len(pixels)).sqrt().numpy(), vmin=0, cmap="magma")
        figure.colorbar(shown, ax=axis).ax.tick_params(labelsize=7)
        axis.set_title("error of each place, grey levels (RMS)", fontsize=9)
        axis.tick_params(labelsize=7)
        figure.savefig(folder / "errors.png", transparent=True)


@torch.inference_mode()
def show_prefixes(folder: Path, tokenizer: Tokenizer, pixels: Tensor, tokens: Tokens, device: torch.device) -> None:
    """The first images scale by scale, where the decoder can stop."""
    layout = tokenizer.layout
    if not layout.decodes_prefixes:
        return
    first = tokens[:6].to(device)
    columns = [to_uint8(tokenizer.decode(tokenizer.first_scales(first, k))).cpu() for k in layout.prefixes]
    labels = [prefix_name(layout, k) for k in layout.prefixes]
    rows = [[*images, original] for *images, original in zip(*columns, pixels[:6], strict=True)]
    sheet(rows, column_labels=[*labels, "original"]).save(folder / "prefixes.png")


def show_samples(
    folder: Path, drawn: Tensor, labels: Tensor, class_names: tuple[str, ...], name: str = "samples.png"
) -> None:
    """Samples row by row: one class a row, or the first ones where there are no classes."""
    if class_names:
        shown = range(min(len(class_names), MAX_CLASSES_SHOWN))
        rows = [drawn[labels == label][:NUM_SHOWN] for label in shown]
        kept = [(row, class_names[label]) for label, row in zip(shown, rows, strict=True) if len(row)]
        picture = sheet([row for row, _ in kept], [name for _, name in kept])
    else:
        picture = sheet(drawn[: 6 * NUM_SHOWN].split(NUM_SHOWN))
    picture.save(folder / name)


def show_captioned(folder: Path, drawn: Tensor, originals: Tensor, texts: Sequence[str]) -> None:
    """Samples beside the images whose captions they were drawn from, one caption a row."""
    pairs = list(zip(originals, drawn, strict=True))[:MAX_CLASSES_SHOWN]
    sheet(pairs, texts[:MAX_CLASSES_SHOWN], ("held-out image", "sample")).save(folder / "samples.png")


def show_upsampling(
    folder: Path, small: Tensor, bicubic: Tensor, versions: Sequence[Tensor], bound: Tensor, original: Tensor
) -> None:
    """One row an image: the small one, bicubic, samples, the tokenizer's bound, the original."""
    count = len(versions[0])
    rows = list(zip(*(each[:count] for each in (small, bicubic, *versions, bound, original)), strict=True))
    samples = [f"sample {number}" for number in range(1, len(versions) + 1)]
    sheet(rows, column_labels=["input", "bicubic", *samples, "bound", "original"]).save(folder / "upsampling.png")


def show_columns(path: Path, columns: Sequence[tuple[str, Tensor]], names: Sequence[str], count: int) -> None:
    """One row an image, ``count`` of them, with their names if any; ``columns`` are names with uint8 images."""
    rows = list(zip(*(pixels[:count] for _, pixels in columns), strict=True))
    sheet(rows, names[:count], [name for name, _ in columns]).save(path)


def show_neighbours(
    folder: Path,
    config: ImagesConfig,
    drawn: Tensor,
    small: Tensor,
    train: Tensor,
    train_indices: list[int],
    source: ImageSource,
    features: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """The first samples, and those nearest to any training image, each above its nearest training images."""
    by_pixels = nearest(small, train)
    by_features = None if features is None else nearest(features[1], features[2])
    rows: list[Tensor] = []
    labels: list[str] = []
    closest = by_pixels.distances[:, 0].argsort()[:NUM_SHOWN]
    for name, chosen in (("sample", torch.arange(min(NUM_SHOWN, len(small)))), ("closest sample", closest)):
        rows.append(drawn[chosen])
        labels.append(name)
        for space, found in (("pixels", by_pixels), ("features", by_features)):
            if found is not None:
                places = [train_indices[i] for i in found.indices[chosen, 0].tolist()]
                rows.append(pixels_of(source, places, config))
                labels.append(f"nearest in {space}")
    sheet(rows, labels).save(folder / "neighbours.png")
