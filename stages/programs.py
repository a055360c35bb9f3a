"""Encoder and decoder as programs that need torch alone: pixels → ids and ids → pixels by ``torch.export``.

What is notable here:

- the batch is dynamic, everything else has the size that the tokenizer has;
- both are traced on the CPU and give what the tokenizer itself gives there, bit for bit: ``check_programs``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from data.errors import InputError
from data.layout import Tokens
from stages.contract import Tokenizer

CHECKED_BATCHES = (1, 2, 5)


class _Encoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.encode(pixels).ids


class _Decoder(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokenizer.decode(Tokens.fixed(ids))


def check_exportable(tokenizer: Tokenizer) -> None:
    """Raise InputError for a codec: its streams are made by code that is no graph of tensors."""
    if not any(True for _ in tokenizer.parameters()):
        raise InputError(
            f"a {type(tokenizer).__name__} has no network that could be exported as a program; allowed are learned "
            "tokenizers: tokenizer.kind=sit, vit-vqgan or nested"
        )


@torch.no_grad()
def export_programs(tokenizer: Tokenizer) -> dict[str, ExportedProgram]:
    """``encoder``: pixels float32 [B, C, H, W] in [-1, 1] → ids int64 [B, L, F], and ``decoder``: ids → pixels.

    Takes a tokenizer in eval mode on the CPU. Raises InputError for a codec.
    """
    check_exportable(tokenizer)
    batch = ({0: Dim("batch")},)
    pixels = _example(tokenizer, 2)
    # both are run before they are traced: what a transform caches at its first call must not be a tensor of the tracer
    ids = tokenizer.encode(pixels).ids
    tokenizer.decode(Tokens.fixed(ids))
    programs = {
        "encoder": torch.export.export(_Encoder(tokenizer), (pixels,), dynamic_shapes=batch),
        "decoder": torch.export.export(_Decoder(tokenizer), (ids,), dynamic_shapes=batch),
    }
    for program in programs.values():
        _forget_places(program)
    return programs


def _forget_places(program: ExportedProgram) -> None:
    """Remove stack traces: they name the folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@torch.no_grad()
def check_programs(programs: Mapping[str, ExportedProgram], tokenizer: Tokenizer) -> None:
    """Raise InputError unless the programs give the tokenizer's own ids and pixels for batches of several sizes."""
    encode, decode = (programs[name].module() for name in ("encoder", "decoder"))
    for batch in CHECKED_BATCHES:
        pixels = _example(tokenizer, batch)
        tokens = tokenizer.encode(pixels)
        if not torch.equal(encode(pixels), tokens.ids):
            raise InputError(f"the exported encoder gives other ids than the tokenizer for {batch} images")
        if not torch.equal(decode(tokens.ids), tokenizer.decode(tokens)):
            raise InputError(f"the exported decoder gives other pixels than the tokenizer for {batch} images")


def _example(tokenizer: Tokenizer, batch: int) -> Tensor:
    """Noise float32 [batch, C, H, W] in [-1, 1]."""
    shape = (batch, tokenizer.channels, *tokenizer.layout.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch)) * 2 - 1
