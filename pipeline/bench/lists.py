"""Memory of a prior over lists by image size: what grows with the image, and what does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from data.images.sources import open_source
from data.images.views import to_float
from data.layout import Tokens
from pipeline.config import Config
from pipeline.errors import RunError
from pipeline.evaluation_images import read_images
from stages.conditions.labels import NoConditionConfig
from stages.contract import Prompts
from stages.factory import build_prior, build_tokenizer
from stages.measures.memory import saved_bytes
from stages.prior.chunked import ChunkedPrior

MEASURED = 8
"""Number of images; the one with the longest list is used."""


def check_memory(config: Config, sides: list[int]) -> None:
    """Raise RunError for a prior without chunks, or sides below 1."""
    if sides and config.prior.kind != "chunked":
        raise RunError(f"memory= compares chunks with whole lists; prior.kind={config.prior.kind} has no chunks")
    if any(side < 1 for side in sides):
        raise RunError(f"memory={','.join(map(str, sides))}; allowed: sides of 1 px or more")


def measure_memory(config: Config, sides: list[int]) -> list[dict[str, Any]]:
    """Training memory for one list at each image side: in chunks, and with one decoder over the whole list.

    Nothing is trained: the parts are built as in the config, without a condition. Raises RunError for images whose
    lists do not fill a chunk.
    """
    results = []
    for side in sides:
        images = dataclasses.replace(config.images, size=side)
        source = open_source(images, "val")
        pixels = read_images(source, images, MEASURED).pixels
        tokenizer = build_tokenizer(config.tokenizer, (side, side), images.channels)
        tokenizer.fit([(to_float(pixels), torch.full((len(pixels),), -1))])
        tokens = tokenizer.encode(to_float(pixels))
        row = int(tokens.lengths.argmax())
        longest = tokens[row : row + 1].prefix(int(tokens.lengths[row]))
        length = longest.ids.shape[1]
        chunk: int = config.prior.chunk  # type: ignore[attr-defined]
        if length < chunk:
            raise RunError(f"lists of {side} px have {length} elements at most, less than prior.chunk={chunk}")
        entry: dict[str, Any] = {"side": side, "elements": length, "chunk": chunk}
        for name, size in (("by_chunks", chunk), ("whole", length)):
            # with this bias, training always takes the first chunk, which is full
            settings = dataclasses.replace(config.prior, chunk=size, early_bias=1e3)  # type: ignore[call-arg]
            prior = build_prior(settings, NoConditionConfig(), tokenizer.layout, [])
            assert isinstance(prior, ChunkedPrior)
            entry[name] = bytes_of(prior, longest)
        results.append(entry)
        print(
            f"memory {side:4d} px, {length:6d} elements: "
            + "; ".join(
                f"{name.replace('_', ' ')} "
                + ", ".join(f"{part} {size / 1e6:.1f}" for part, size in entry[name].items())
                for name in ("by_chunks", "whole")
            )
            + " MB"
        )
    return results


def bytes_of(prior: ChunkedPrior, tokens: Tokens) -> dict[str, int]:
    """Bytes saved by the layers of the decoders, by the encoder, and by the rest: embeddings, logits and losses."""
    # keys and values that the decoders receive are computed from the encoder's output and count for the encoder
    prompts = Prompts.of_labels(torch.tensor([-1]))
    saved = saved_bytes(lambda: prior(tokens, prompts), prior, prior.parts, {"decoders": "encoder"})
    return {**saved, "total": sum(saved.values())}
