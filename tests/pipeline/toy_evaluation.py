"""A run of networks that were never trained, as ``eval`` takes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from data.images.config import ImagesConfig
from data.images.module import validation_indices
from data.images.reading import pixels_of
from data.images.sources import open_source
from pipeline.config import Config, load_config
from pipeline.evaluation_images import read_images
from pipeline.models import Models, load_models
from stages.conditions.labels import ClassConditionConfig
from stages.factory import build_prior, build_tokenizer
from stages.measures.config import EvalConfig
from stages.prior.sampling import SamplingConfig
from stages.prior.transformer import TransformerPriorConfig
from stages.tokenizer.quantizers import FSQConfig
from stages.tokenizer.sit import SIT, SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig
from stages.weights import file_sha256, load_tokenizer, save_prior, save_tokenizer

CLASSES = ["bright", "dark"]


def toy_run(folder: Path, images: Path, with_prior: bool, attention: str = "sit-scd") -> Config:
    """A run with an untrained tokenizer and, where asked, an untrained prior of its tokens."""
    width = TransformerConfig(depth=1, width=16, heads=2)
    tokenizer_config = SITConfig(
        path=str(folder / "tokenizer/tokenizer.safetensors"),
        scales=2,
        patch=4,
        attention=attention,
        encoder=width,
        decoder=width,
        quantizer=FSQConfig(levels=[3, 3]),
    )
    config = Config(
        name="toy",
        run=str(folder),
        images=ImagesConfig(kind="folder", path=str(images), size=16),
        tokenizer=tokenizer_config,
        condition=ClassConditionConfig(),
        prior=TransformerPriorConfig(path=str(folder / "prior/prior.safetensors"), depth=1, width=16, heads=2),
        eval=EvalConfig(num_images=16, num_samples=6, batch_size=4, classifier_steps=5, neighbours=2),
    )
    config.tokens.path = str(folder / "tokens")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tokenizer_config, (16, 16), 3)
    path = Path(tokenizer_config.path)
    save_tokenizer(path, tokenizer, tokenizer_config, {"perceptual": "lite0"})
    if with_prior:
        prior = build_prior(config.prior, config.condition, tokenizer.layout, CLASSES)
        extra = {"tokenizer_sha256": file_sha256(path)}
        save_prior(Path(config.prior.path), prior, config.prior, config.condition, extra)
    return config


def write_baseline(path: Path, size: int = 16) -> Path:
    """An untrained raster tokenizer of images of ``size`` px."""
    width = TransformerConfig(depth=1, width=16, heads=2)
    config = ViTVQGANConfig(patch=4, encoder=width, decoder=width, quantizer=FSQConfig(levels=[3, 3]))
    torch.manual_seed(2)
    save_tokenizer(path, build_tokenizer(config, (size, size), 3), config, {"perceptual": "none"})
    return path


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def held_out_of(evaluated: Path) -> tuple[SIT, Tensor]:
    """The tokenizer of an evaluation and its held-out images, uint8 [16, 3, 16, 16], in their order."""
    settings = read(evaluated)["settings"]
    tokenizer, _ = load_tokenizer(Path(settings["tokenizer"]["path"]))
    assert isinstance(tokenizer, SIT)
    images = ImagesConfig(**settings["config"]["images"])
    source = open_source(images, "val")
    return tokenizer, pixels_of(source, validation_indices(len(source), 16, images.split_seed), images)


def models_of(evaluated: Path, tmp_path: Path) -> tuple[Models, list[int], SamplingConfig]:
    """The models of an evaluation, the classes of its held-out images, and how it sampled."""
    (tmp_path / "run.yaml").write_text(json.dumps(read(evaluated)["settings"]["config"]))
    config = load_config(tmp_path / "run.yaml", [])
    val = read_images(open_source(config.images, "val"), config.images, 16)
    return load_models(config), val.labels.tolist(), config.sampling


def mean_psnr(made: Tensor, wanted: Tensor) -> float:
    error = (made.double() - wanted.double()).square().mean((1, 2, 3))
    return float((10 * (255**2 / error).log10()).mean())
