"""sample: new images from a trained prior, as a grid and as single files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from data.images.views import to_uint8
from data.layout import Tokens
from pipeline.config import Config
from pipeline.run import RunError, device_of, need
from stages.contract import Prior, Tokenizer
from stages.measures.pictures import sheet
from stages.prior.sampling import check_sampling, sample
from stages.weights import check_pair, load_prior, load_tokenizer


@dataclass
class SampleRequest:
    """What to sample: keys without a section on the command line of ``sample``."""

    classes: str = ""
    """Class names or ids, comma-separated; empty: every class."""
    count: int = 4
    """Images of each class."""
    seed: int = 0
    """Image i is drawn with seed + i."""
    out: str = "${run}/samples"
    """Folder for grid.png and the single images."""


def load_models(config: Config) -> tuple[Tokenizer, Prior, torch.device]:
    """The tokenizer and the prior of a run, on the device of ``trainer.accelerator``. Raises RunError, WeightsError."""
    tokenizer_path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    prior_path = need(config.prior.path, "prior", "train-prior", config)
    prior, metadata = load_prior(prior_path)
    check_pair(metadata, prior_path, tokenizer_path)
    tokenizer, _ = load_tokenizer(tokenizer_path)
    device = device_of(config)
    if config.sampling.compile:
        prior.compile_step()
    return tokenizer.to(device), prior.to(device), device


def sample_images(config: Config, request: SampleRequest) -> Path:
    """Write ``grid.png`` (a row a class, enlarged) and one PNG an image. Returns the grid's path."""
    tokenizer, prior, device = load_models(config)
    check_sampling(config.sampling, prior.layout)
    if config.sampling.scales and not prior.layout.decodes_prefixes:
        raise RunError(
            f"sampling.scales={config.sampling.scales}: this tokenizer's decoder needs all {len(prior.layout.scales)} "
            "scales; train one with tokenizer.attention=sit-scd or sit-sc"
        )
    if request.count < 1:
        raise RunError(f"count={request.count}; allowed: 1 or more")
    labels = parse_classes(request.classes, prior.class_names if prior.condition.uses_labels else [])
    rows = torch.tensor(labels).repeat_interleave(request.count)
    seeds = [request.seed + index for index in range(len(rows))]
    pictures = draw_images(tokenizer, prior, rows, config, seeds, device)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    for label, seed, picture in zip(rows.tolist(), seeds, pictures, strict=True):
        name = "sample" if label < 0 else _file_name(prior.class_names[label])
        save_image(picture.float() / 255, out / f"{name}-{seed:06d}.png")
    names = [prior.class_names[label] if label >= 0 else "" for label in labels]
    sheet(pictures.split(request.count), names if any(names) else ()).save(out / "grid.png")
    print(f"wrote {out / 'grid.png'} and {len(pictures)} images beside it")
    return out / "grid.png"


def draw_images(
    tokenizer: Tokenizer,
    prior: Prior,
    labels: Tensor,
    config: Config,
    seeds: list[int],
    device: torch.device,
) -> Tensor:
    """Images uint8 [N, C, h, w] for class ids int64 [N], drawn in batches; the batch size changes speed only."""
    parts = []
    size = min(config.eval.batch_size, len(labels))
    for start in tqdm(range(0, len(labels), size), "Sampling", disable=not config.trainer.progress):
        batch = labels[start : start + size]
        chosen = seeds[start : start + size]
        # a compiled step wants one shape: the last batch is filled up and cut
        padded = torch.cat([batch, batch.new_full((size - len(batch),), -1)])
        filled = [*chosen, *([0] * (size - len(batch)))]
        # bfloat16 where it is fast; a CPU samples in float32
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = sample(prior, padded.to(device), config.sampling, filled)
        tokens = Tokens.fixed(tokens.ids[: len(batch)])
        with torch.inference_mode():
            parts.append(to_uint8(tokenizer.decode(tokens)).cpu())
    return torch.cat(parts)


def parse_classes(text: str, names: list[str]) -> list[int]:
    """Class ids of comma-separated names or ids; all classes for an empty text, [-1] where there are none."""
    if not names:
        return [-1]
    if not text:
        return list(range(len(names)))
    ids = []
    for part in (part.strip() for part in str(text).split(",")):
        if part in names:
            ids.append(names.index(part))
        elif part.isdigit() and int(part) < len(names):
            ids.append(int(part))
        else:
            raise RunError(f"classes={part}: allowed are 0 to {len(names) - 1}, or {', '.join(names[:20])}")
    return ids


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
