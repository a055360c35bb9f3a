"""Allowed values of single config keys, independent of other keys.

There is one table per type of range. Keys that the chosen kinds do not have are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from data.tokens.config import PRECISIONS
from stages.prior.config import AVERAGING, AVERAGING_BORDERS
from stages.tokenizer.config import PLANES
from stages.tokenizer.parts import GRADIENT_NAMES

if TYPE_CHECKING:
    from pipeline.config import Config

ALLOWED: dict[str, tuple[Any, ...]] = {
    "images.kind": ("folder", "webdataset", "fashion", "demo", "photos"),
    "images.channels": (1, 3),
    "images.train_view": ("center", "random_resized_crop", "random_crop", "pad"),
    "images.eval_view": ("center", "pad"),
    "tokens.precision": PRECISIONS,
    "tokenizer.planes": PLANES,
    "tokenizer.quantizer.gradient": GRADIENT_NAMES,
    "tokenizer_training.optimizer": ("adamw", "muon"),
    "tokenizer_training.precision": PRECISIONS,
    "tokenizer_training.perceptual": ("lite0", "lpips-vgg", "none"),
    "tokenizer_training.discriminator": ("patch", "style"),
    "tokenizer_training.adversarial_loss": ("hinge", "logistic"),
    "prior.averaging": AVERAGING,
    "prior.averaging_borders": AVERAGING_BORDERS,
    "prior_training.optimizer": ("adamw", "muon"),
    "prior_training.precision": PRECISIONS,
    "sampling.precision": PRECISIONS,
    "eval.precision": PRECISIONS,
    "trainer.accelerator": ("auto", "cpu", "gpu", "mps"),
    "trainer.strategy": ("ddp", "fsdp"),
}

SHARES = (
    "images.val_share",
    "images.max_corrupt_share",
    "condition.dropout",
    "prior.dropout",
    "tokenizer_training.ema_decay",
    "prior_training.ema_decay",
)

POSITIVE = (
    "images.size",
    "tokens.encode_batch_size",
    "tokens.blocks_per_shard",
    "tokens.max_caption_tokens",
    "tokens.vocabulary_size",
    "tokenizer_training.max_steps",
    "tokenizer_training.batch_size_per_device",
    "tokenizer_training.accumulate_batches",
    "prior_training.max_steps",
    "prior_training.batch_size_per_device",
    "prior_training.accumulate_batches",
    "prior_training.bucket_batches",
    "tokenizer_training.log_every",
    "tokenizer_training.checkpoint_every",
    "tokenizer_training.validate_every",
    "tokenizer_training.validation_images",
    "tokenizer_training.fit_images",
    "tokenizer_training.r1_every",
    "tokenizer_training.oversampling",
    "prior_training.log_every",
    "prior_training.checkpoint_every",
    "prior_training.validate_every",
    "prior_training.validation_samples",
    "eval.num_images",
    "eval.num_samples",
    "eval.batch_size",
    "eval.neighbours",
    "eval.num_upsampled",
    "eval.num_edited",
    "eval.num_head",
)

ZERO_OR_MORE = (
    "tokenizer_training.entropy_weight",
    "prior.early_bias",
    "prior_training.shuffle_shards",
    "eval.timing_repeats",
)

AUTO_OR_MORE = ("trainer.num_workers",)

ABOVE_ZERO = (
    "tokens.local_gigabytes",
    "tokenizer.quantizer.temperature",
    "tokenizer_training.learning_rate",
    "tokenizer_training.matrix_learning_rate",
    "tokenizer_training.discriminator_learning_rate",
    "prior_training.learning_rate",
    "prior_training.matrix_learning_rate",
)

# Network sizes.
NETWORK_SIZES = (
    *(f"tokenizer.{part}.{key}" for part in ("encoder", "decoder") for key in ("depth", "width", "heads")),
    *(f"prior.{key}" for key in ("depth", "width", "heads", "max_length", "chunk", "overlap", "patch")),
    *(f"prior.{part}_depth" for part in ("encoder", "channel", "position", "value")),
    *(f"tokenizer.quantizer.{key}" for key in ("code_dim", "depth")),
)


RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    ((*POSITIVE, *NETWORK_SIZES), lambda value: value >= 1, "1 or more"),
    (ZERO_OR_MORE, lambda value: 0 <= value < math.inf, "0 or more"),
    (ABOVE_ZERO, lambda value: 0 < value < math.inf, "above 0"),
    (SHARES, lambda value: 0 <= value < 1, "0 to 1, without 1"),
    (AUTO_OR_MORE, lambda value: value == "auto" if isinstance(value, str) else value >= 0, "auto, or 0 or more"),
)

# Ranges of integers, both ends included.
BETWEEN = {
    "tokenizer.quantizer.codes": (2, 2**16),
    "tokenizer.quantizer.bits": (1, 64),
    "tokenizer.quantizer.bits_per_field": (1, 16),
    "tokenizer.quantizer.entropy_group_bits": (1, 18),
}


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; None if the chosen kind does not have it."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def out_of_range(config: Config) -> str | None:
    """One line that names the first value out of its range, and what is allowed; None if all values are valid."""
    for key, allowed in ALLOWED.items():
        if (value := get(config, key)) is not None and value not in allowed:
            return f"{key}={value!r}; allowed: {', '.join(map(str, allowed))}"
    for keys, fits, description in RANGES:
        for key in keys:
            if (value := get(config, key)) is not None and not fits(value):
                return f"{key}={value}; allowed: {description}"
    for key, (low, high) in BETWEEN.items():
        if (value := get(config, key)) is not None and not low <= value <= high:
            return f"{key}={value}; allowed: {low} to {high}"
    return None
