"""Speed of a tokenizer in images per second: encoding, decoding, and training with each of its losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from data.images.module import ImageDataModule
from data.layout import Tokens
from pipeline.bench.figures import Figure, speeds
from pipeline.bench.place import Place
from pipeline.bench.steps import compare_steps
from pipeline.placement import image_loaders
from stages.factory import build_grammar, build_tokenizer
from stages.measures.backbones import BackboneError
from stages.tokenizer.config import TokenizerTrainingConfig
from stages.tokenizer.module import TokenizerModule

LOSSES: dict[str, dict[str, float | str]] = {
    "pixels alone": {"adversarial_weight": 0.0, "perceptual": "none"},
    "and perceptual": {"adversarial_weight": 0.0},
    "and adversarial": {"perceptual": "none"},
    "and both": {},
}


def bench_tokenizer(place: Place) -> list[Figure]:
    """Images per second when encoding, decoding and, for streams and lists, annotating tokens with their grammar."""
    tokenizer, batches = place.tokenizer, place.batches
    encoded: list[Tokens] = [tokenizer.encode(batch) for batch in batches]
    tasks: dict[str, Callable[[], object]] = {
        "encode": lambda: [tokenizer.encode(batch).to("cpu") for batch in batches],
        "decode": lambda: [tokenizer.decode(tokens).cpu() for tokens in encoded],
    }
    grammar = build_grammar(tokenizer.layout)
    if grammar is not None:
        tasks["annotate"] = lambda: [grammar.annotate(tokens.to("cpu")) for tokens in encoded]
    with torch.inference_mode():
        return speeds("tokenizer", tasks, sum(map(len, batches)), "images/s", place.repeats)


def bench_training(place: Place) -> list[Figure]:
    """Images per second in training steps of one micro-batch, with some losses left out. Empty for a codec."""
    config = place.config
    training = dataclasses.replace(config.tokenizer_training, start_from=None)
    size = (config.images.size, config.images.size)
    arms: dict[str, TokenizerTrainingConfig] = {}
    for name, changes in LOSSES.items():
        arm = dataclasses.replace(training, **changes)  # type: ignore[arg-type]
        if arm not in arms.values():  # the config itself may leave a loss out
            arms[name] = arm
    if not build_tokenizer(config.tokenizer, size, config.images.channels).trainable:
        print("training: a codec is not trained")
        return []

    def prepared(training: TokenizerTrainingConfig) -> tuple[TokenizerModule, ImageDataModule]:
        images = ImageDataModule(
            dataclasses.replace(config.images, skip_corrupt=True),
            training.batch_size_per_device,
            image_loaders(config),
            config.seed,
            validation_images=1,
            oversampling=training.oversampling,
        )
        tokenizer = build_tokenizer(config.tokenizer, size, config.images.channels)
        return TokenizerModule(tokenizer, training, config.seed), images

    try:
        return compare_steps("training", arms, prepared, place, 1, "images/s")
    except BackboneError as error:
        print(f"training: {error}")
        return []
