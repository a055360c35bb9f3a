"""Export encoder and decoder with ``torch.export``, as programs that need only torch: pixels → ids and ids → pixels.

- The batch size is dynamic, all other sizes are fixed by the tokenizer.
- Both programs are traced on the CPU and are bitwise equal to the tokenizer there; ``check_programs`` verifies this.
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
    """Raise InputError for a codec: its code is not a graph of tensor operations."""
    if not any(True for _ in tokenizer.parameters()):
        raise InputError(
            f"a {type(tokenizer).__name__} has no network that could be exported as a program; allowed: learned "
            "tokenizers, which are tokenizer.kind=sit, vit-vqgan or nested"
        )


@torch.no_grad()
def export_programs(tokenizer: Tokenizer) -> dict[str, ExportedProgram]:
    """Export ``encoder``: pixels float32 [B, C, H, W] in [-1, 1] → ids int64 [B, L, F], and ``decoder``: ids → pixels.

    The tokenizer must be in eval mode and on the CPU. Raises InputError for a codec.
    """
    check_exportable(tokenizer)
    batch = ({0: Dim("batch")},)
    pixels = _example(tokenizer, 2)
    # run both before tracing: tensors that transforms cache at their first call must not be tracer tensors
    ids = tokenizer.encode(pixels).ids
    tokenizer.decode(Tokens.fixed(ids))
    programs = {
        "encoder": torch.export.export(_Encoder(tokenizer), (pixels,), dynamic_shapes=batch),
        "decoder": torch.export.export(_Decoder(tokenizer), (ids,), dynamic_shapes=batch),
    }
    for program in programs.values():
        _remove_stack_traces(program)
    return programs


def _remove_stack_traces(program: ExportedProgram) -> None:
    """Remove stack traces, which contain paths of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@torch.no_grad()
def check_programs(programs: Mapping[str, ExportedProgram], tokenizer: Tokenizer) -> None:
    """Raise InputError unless the programs give the same ids and pixels as the tokenizer, for several batch sizes."""
    encode, decode = (programs[name].module() for name in ("encoder", "decoder"))
    for batch in CHECKED_BATCHES:
        pixels = _example(tokenizer, batch)
        tokens = tokenizer.encode(pixels)
        if not torch.equal(encode(pixels), tokens.ids):
            raise InputError(f"the exported encoder gives other ids than the tokenizer for {batch} images")
        if not torch.equal(decode(tokens.ids), tokenizer.decode(tokens)):
            raise InputError(f"the exported decoder gives other pixels than the tokenizer for {batch} images")


def _example(tokenizer: Tokenizer, batch: int) -> Tensor:
    """Random pixels float32 [batch, C, H, W] in [-1, 1]."""
    shape = (batch, tokenizer.channels, *tokenizer.layout.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch)) * 2 - 1
