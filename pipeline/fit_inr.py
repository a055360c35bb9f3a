"""fit-inr: fit coordinate networks to an image and compare their PSNR over the training steps.

This is the task of the papers on WIRE (arXiv 2301.05187) and on the algebra of complex wavelets (2310.00545), with
their networks and two common ones, all with about equally many parameters. A network represents only its image, so
there is no CONFIG and no run folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from data.errors import OctavesError
from data.files import write_atomically
from data.images.config import ImagesConfig
from data.images.source import decode
from data.images.views import plain_image
from pipeline.placement import device_for
from stages.inr.fit import Fit, fit_variant
from stages.inr.variants import VARIANTS
from stages.measures.pictures import error_picture, sheet


@dataclass
class FitRequest:
    """Keys of ``fit-inr``."""

    variants: str = "all"
    """Networks, comma-separated: fourier-relu, siren, wire-real, wire, split, split-singular; or all."""
    steps: int = 2000
    """Training steps of each network."""
    size: int = 128
    """Images are reduced to at most this many pixels on the longer side; 0: no limit."""
    hidden: int = 256
    """Width of a hidden layer in real numbers; complex layers are narrower, for about as many parameters."""
    layers: int = 2
    """Number of hidden layers after the first layer."""
    learning_rate: float = 0.0
    """Initial learning rate of Adam, which decays to a tenth; 0: the default of each variant."""
    seed: int = 0
    """Seed of the initial weights, and of the pixels per step for images with more than 65,536 pixels."""
    log_every: int = 50
    """Steps between measurements."""
    out: str = "fit-inr"
    """Folder for fit.json, psnr.png and one sheet per image."""


class FitError(OctavesError):
    """An invalid image or setting. The message says what is allowed."""


def run_fit(arguments: Sequence[str]) -> None:
    """Run the command with image paths and ``key=value`` items of ``FitRequest``. Raises FitError."""
    request = read_keys([item for item in arguments if "=" in item])
    fit_images([Path(item).expanduser() for item in arguments if "=" not in item], request)


def read_keys(items: Sequence[str]) -> FitRequest:
    """Parse ``key=value`` items; values are taken literally. Raises FitError, naming key and value."""
    kinds = get_type_hints(FitRequest)
    values = {}
    for item in items:
        key, _, value = item.partition("=")
        if key not in kinds:
            raise FitError(f"fit-inr: no key {key!r} ({item}); allowed: {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise FitError(f"fit-inr: {item}; allowed: a {'whole ' * (kinds[key] is int)}number") from error
    request = FitRequest(**values)
    check(request)
    return request


def check(request: FitRequest) -> None:
    """Raise FitError, naming the first value that is out of range."""
    for key, fits, allowed in (
        ("steps", request.steps >= 1, "1 or more"),
        ("size", request.size == 0 or request.size >= 2, "0 for the image's own, or 2 pixels or more"),
        ("hidden", request.hidden >= 2, "2 or more"),
        ("layers", request.layers >= 1, "1 or more"),
        ("learning_rate", 0 <= request.learning_rate < math.inf, "above 0, or 0 for each variant's own"),
        ("seed", 0 <= request.seed < 2**63, "0 to 2^63 - 1"),
        ("log_every", request.log_every >= 1, "1 or more"),
    ):
        if not fits:
            raise FitError(f"fit-inr: {key}={getattr(request, key)}; allowed: {allowed}")


def chosen_variants(text: str) -> list[str]:
    """Names in ``variants=`` without duplicates. Raises FitError for an unknown one."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in (*VARIANTS, "all"):
            raise FitError(f"fit-inr: variants={name}; allowed: all, {', '.join(VARIANTS)}")
    return list(VARIANTS) if "all" in names else list(dict.fromkeys(names))


def fit_images(paths: Sequence[Path], request: FitRequest) -> Path:
    """Fit every variant to every image. Returns the path of ``fit.json``, which is written last.

    Also writes one sheet per image and ``psnr.png``. Raises FitError for images that are missing or whose results would
    overwrite something, CorruptImage for unreadable ones.
    """
    names = chosen_variants(request.variants)
    out = Path(request.out).expanduser()
    check_paths(paths, out)
    images = {path: read_image(path, request.size) for path in paths}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FitError(f"fit-inr: out={request.out}: {error.strerror}; give a folder that can be created") from error
    (out / "fit.json").unlink(missing_ok=True)
    device = device_for("auto").type
    results: dict[str, dict[str, Any]] = {}
    for path, image in images.items():
        print(f"{path}, {image.shape[2]}x{image.shape[1]} px, {request.steps} steps")
        print(f"{'':16s}{'parameters':>10s}{'rate':>9s}{'PSNR':>10s}{'best':>10s}{'seconds':>10s}{'a step':>11s}")
        fits = {}
        for name in names:
            fits[name] = fit_variant(
                name,
                image,
                request.hidden,
                request.layers,
                request.steps,
                request.learning_rate,
                request.seed,
                request.log_every,
                device,
            )
            print(row_of(name, fits[name]), flush=True)
        rows = [
            [image, *(fit.pixels for fit in fits.values())],
            [error_picture(pixels, image) for pixels in (image, *(fit.pixels for fit in fits.values()))],
        ]
        sheet(rows, [path.stem, "4 x error"], ["original", *fits]).save(out / f"{path.stem}.png")
        results[path.stem] = {
            "file": str(path),
            "size": list(image.shape[1:]),
            "variants": {name: plain(fit) for name, fit in fits.items()},
        }
    draw_psnr(results, out / "psnr.png")
    settings = {**asdict(request), "variants": names, "device": device, "threads": torch.get_num_threads()}
    content = json.dumps({"settings": settings, "images": results}, indent=1) + "\n"
    write_atomically(out / "fit.json", content.encode())
    print(f"wrote {out / 'fit.json'}, psnr.png and one sheet per image")
    return out / "fit.json"


def check_paths(paths: Sequence[Path], out: Path) -> None:
    """Raise FitError if an image is missing, or if a result would have the name of another result or of an input."""
    if not paths:
        raise FitError("fit-inr needs an image: octaves fit-inr image.png [key=value …]")
    for path in paths:
        if path.is_dir():
            raise FitError(f"fit-inr: {path} is a folder; allowed: image files, one or several")
        if not path.is_file():
            raise FitError(f"fit-inr: {path}: no such image")
    results: dict[str, Path | None] = {"psnr": None}
    for path in paths:
        if path.stem in results:
            other = results[path.stem] or "the plot psnr.png"
            raise FitError(f"fit-inr: the sheets of {path} and {other} would have the same name; rename the image")
        results[path.stem] = path
    for path in paths:
        for name in results:
            if (out / f"{name}.png").resolve() == path.resolve():
                raise FitError(f"fit-inr: out={out}: {name}.png would overwrite the image {path}; choose another out=")


def read_image(path: Path, size: int) -> Tensor:
    """Read uint8 [3, h, w]: upright, on the background of ``ImagesConfig``, longer side at most ``size`` (0: any).

    Raises CorruptImage.
    """
    image = plain_image(decode(path, str(path)), 3, ImagesConfig().background)
    longer = max(image.size)
    if size and longer > size:
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        # Pillow widens its filters by the reduction factor, which avoids aliasing
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def plain(fit: Fit) -> dict[str, Any]:
    """A fit as plain data for JSON, without its pixels. A network that diverged has no final PSNR."""
    numbers = {key: value for key, value in vars(fit).items() if key != "pixels"}
    final = fit.psnr[-1] if fit.diverged is None else None
    return {**numbers, "final_psnr": final, "best_psnr": max(fit.psnr, default=None)}


def row_of(name: str, fit: Fit) -> str:
    """One line of the table."""
    begin = f"{name:16s}{fit.parameters:10,d}{fit.learning_rate:9g}"
    if fit.diverged is not None:
        return f"{begin}   diverged: no finite number after {fit.diverged} steps; try a smaller learning_rate="
    seconds = f"{fit.seconds:8.1f} s{1000 * fit.seconds_per_step:8.1f} ms"
    return f"{begin}{fit.psnr[-1]:7.2f} dB{max(fit.psnr):7.2f} dB{seconds}"


def draw_psnr(images: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot PSNR over steps: one panel per image, one curve per variant; a cross marks divergence."""
    figure = Figure(figsize=(1 + 5 * len(images), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(images), sharey=True, squeeze=False)[0]
    for axis, (name, image) in zip(panels, images.items(), strict=True):
        for variant, fit in image["variants"].items():
            (line,) = axis.plot(fit["steps"], fit["psnr"], label=variant)
            if fit["diverged"] is not None and fit["steps"]:
                axis.plot(fit["steps"][-1], fit["psnr"][-1], "x", color=line.get_color())
        axis.set_title(f"{name}, {image['size'][1]}x{image['size'][0]} px", fontsize=10)
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR, dB")
    panels[0].legend(fontsize=7)
    figure.savefig(path)
