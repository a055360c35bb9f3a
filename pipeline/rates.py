"""rates: compare bit rate and PSNR of evaluated runs with those of common image formats."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, features
from torch import Tensor

from data.images.sources import open_source
from data.images.views import picture_to_pixels, pixels_to_picture
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.evaluation_images import read_images
from pipeline.own_keys import RatesRequest
from stages.measures.distortion import psnr

FORMATS: dict[str, tuple[str, dict[str, Any], str, tuple[Any, ...]]] = {
    "PNG": ("PNG", {"optimize": True}, "", ()),
    "WebP, lossless": ("WEBP", {"lossless": True, "quality": 100, "method": 6}, "", ()),
    "JPEG": ("JPEG", {"optimize": True}, "quality", (5, 10, 20, 35, 50, 65, 80, 90, 95)),
    "WebP": ("WEBP", {"method": 6}, "quality", (1, 5, 15, 30, 50, 70, 85, 95)),
    "JPEG 2000": ("JPEG2000", {"quality_mode": "dB"}, "quality_layers", ([18], [21], [24], [27], [30], [34], [38])),
}
"""Name: (Pillow format, its options, the option that sets the quality, its values; none for lossless formats)."""

SAME = {
    "images": ("kind", "path", "size", "channels", "eval_view", "val_share", "split_seed"),
    "eval": ("num_images",),
}
"""Config keys that determine the images of an evaluation."""

COLOURS = colormaps["tab20"]


def compare_rates(config: Config, request: RatesRequest) -> Path:
    """Write ``rates.json`` and ``rates.png``: bits per pixel and PSNR. Returns the path of the plot.

    The image formats encode ``eval.num_images`` held-out images of this config, cropped as for its tokenizer. Raises
    RunError for an evaluation that is missing or of other images (``SAME``).
    """
    curves = []
    for name in filter(None, (part.strip() for part in request.runs.split(","))):
        curves += curves_of_run(Path(name), config)
    source = open_source(config.images, "val")
    pixels = read_images(source, config.images, config.eval.num_images).pixels
    for name in FORMATS:
        if name == "JPEG 2000" and not features.check("jpg_2000"):
            print("JPEG 2000 left out: this Pillow was built without it")
            continue
        curves.append(curve_of_format(name, pixels))
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"images": len(pixels), "image_size": list(pixels.shape[-2:]), "curves": curves}
    (out / "rates.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw_rates(curves, "x".join(map(str, pixels.shape[-2:])), out / "rates.png")
    for curve in curves:
        for point in curve["points"]:
            distortion = "lossless" if point["psnr"] is None else f"{point['psnr']:6.2f} dB"
            print(f"{curve['name']:40s} {point['setting']:>8s} {point['bits_per_pixel']:8.3f} bits/px {distortion}")
    print(f"wrote {out / 'rates.json'} and {out / 'rates.png'}")
    return out / "rates.png"


def read_metrics(folder: Path, config: Config) -> dict[str, Any]:
    """Metrics of an evaluation. Raises RunError if they are missing, or of other images than those of this config."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise RunError(f"{path} is missing: give evaluation folders, e.g. runs/fashion/eval/default")
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain = metrics["settings"]["config"]
    own = to_plain(config)
    for section, keys in SAME.items():
        for key in keys:
            if plain[section][key] != own[section][key]:
                raise RunError(
                    f"{path} has {section}.{key}={plain[section][key]}, this CONFIG {own[section][key]}: "
                    "only evaluations of the same held-out images can be compared"
                )
    return metrics


def curves_of_run(folder: Path, config: Config) -> list[dict[str, Any]]:
    """Curves of an evaluation, with and without its prior; streams have one point per scale."""
    metrics = read_metrics(folder, config)
    rate, name = metrics["rate"], metrics["settings"]["config"]["name"]
    streams = metrics.get("streams")
    curves = []
    for kind, words in (("prior", "under its prior"), ("uniform", "without a prior")):
        if streams is not None:
            entries = [entry for entry in streams["prefixes"] if entry.get(f"{kind}_bits_per_pixel") is not None]
            points = [
                {
                    "setting": entry["name"],
                    "bits_per_pixel": entry[f"{kind}_bits_per_pixel"],
                    "psnr": entry["psnr_mean_of_images"],
                }
                for entry in entries
                if entry["tokens"] > 0 and entry.get("psnr_mean_of_images") is not None
            ]
        else:
            key = "prior_bits_per_pixel" if kind == "prior" else "fixed_length_bits_per_pixel"
            points = [{"setting": "", "bits_per_pixel": rate[key], "psnr": rate["psnr_mean_of_images"]}]
        if points and points[0]["bits_per_pixel"] is not None:
            curves.append({"name": f"{name}, {words}", "points": points})
    return curves


def curve_of_format(name: str, pixels: Tensor) -> dict[str, Any]:
    """Mean file size and PSNR of images uint8 [N, C, H, W] in an image format, for each of its qualities.

    ``bits_per_pixel_without_frame`` subtracts the size of a black image of the same size, i.e. the headers.
    """
    kind, options, key, values = FORMATS[name]
    points = []
    for value in values or (None,):
        chosen = options | ({} if value is None else {key: value})
        coded = [encode_file(image, kind, chosen) for image in pixels]
        frame = len(encode_file(torch.zeros_like(pixels[0]), kind, chosen))
        num_pixels = pixels.shape[-1] * pixels.shape[-2]
        size = sum(map(len, coded)) / len(coded)
        decoded = torch.stack([decode_file(file, pixels.shape[1]) for file in coded])
        points.append(
            {
                "setting": "" if value is None else str(value).strip("[]"),
                "bits_per_pixel": 8 * size / num_pixels,
                "bits_per_pixel_without_frame": 8 * (size - frame) / num_pixels,
                "psnr": None if torch.equal(decoded, pixels) else float(psnr(decoded, pixels).mean()),
            }
        )
    return {"name": name, "points": points}


def encode_file(image: Tensor, kind: str, options: dict[str, Any]) -> bytes:
    """Encode an image uint8 [C, H, W] in a Pillow format."""
    file = io.BytesIO()
    pixels_to_picture(image).save(file, kind, **options)
    return file.getvalue()


def decode_file(file: bytes, channels: int) -> Tensor:
    """Decode a file to uint8 [C, H, W]."""
    return picture_to_pixels(Image.open(io.BytesIO(file)).convert("L" if channels == 1 else "RGB"))


def draw_rates(curves: list[dict[str, Any]], size: str, path: Path) -> None:
    """Plot all curves; image formats also without headers; lossless formats as a mark on the axis."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(curves):
        colour, points = COLOURS(number % 20), [point for point in curve["points"] if point["psnr"] is not None]
        if not points:
            place = curve["points"][0]["bits_per_pixel"]
            axis.axvline(place, color=colour, linestyle=":", label=f"{curve['name']} (no loss)")
            continue
        values = [point["psnr"] for point in points]
        axis.plot([p["bits_per_pixel"] for p in points], values, "o-", markersize=4, color=colour, label=curve["name"])
        if "bits_per_pixel_without_frame" in points[0]:
            bare = [point["bits_per_pixel_without_frame"] for point in points]
            axis.plot(bare, values, "--", linewidth=1, color=colour, label=f"{curve['name']}, without its headers")
    axis.set_xscale("log")
    axis.set_xlabel(f"bits for each pixel of {size} images")
    axis.set_ylabel("PSNR, dB (mean of images)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path)
