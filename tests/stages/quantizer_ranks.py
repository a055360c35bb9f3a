"""Train every kind of quantizer on one of several ranks."""

from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stages.factory import build_quantizer
from stages.tokenizer.quantizers import (
    BSQConfig,
    CosineVQConfig,
    FSQConfig,
    LFQConfig,
    ResidualVQConfig,
    SimVQConfig,
)

GIVEN = {  # codes are given at the start, so results are equal for any number of ranks
    "fsq": FSQConfig(levels=[4, 4]),
    "lfq": LFQConfig(bits=6, entropy_group_bits=3),
    "lfq, 18 bits": LFQConfig(bits=18),
    "bsq": BSQConfig(bits=6),
    "cosine": CosineVQConfig(codes=16, code_dim=6, revive_every=0),
    "simvq": SimVQConfig(codes=16, code_dim=6, gradient="rotation"),
    "residual": ResidualVQConfig(codes=8, code_dim=6, depth=2, revive_every=0),
}
BORN = {  # codes are initialized from the first rank's features
    "cosine, revived": CosineVQConfig(codes=16, code_dim=6, revive_every=2, revive_below=2.0),
    "residual, revived": ResidualVQConfig(codes=8, code_dim=6, depth=2, revive_every=2, revive_below=2.0),
}
WEIGHTS = {"commitment": 0.25, "codebook": 1.0, "entropy": 0.5}


def train(config, world, rank):
    """(state after four updates, entropy terms) of the quantizer on this rank's part of the joint batches."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config, 8, 8).train()
    if config in GIVEN.values():
        for name, buffer in quantizer.named_buffers():
            if name.endswith("started"):
                buffer.fill_(True)
    # the quantizer synchronizes its buffers itself; they are not copied from the first rank
    model = DistributedDataParallel(quantizer, broadcast_buffers=False) if world > 1 else quantizer
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.2)
    terms = []
    for step in range(4):
        joint = torch.randn(8, 10, 8, generator=torch.Generator().manual_seed(step)) + 0.5
        torch.manual_seed(100 * step + rank)  # random numbers differ between ranks
        x = joint.chunk(world)[rank]
        result = model(x)
        loss = (result.features - x).square().mean()
        loss = loss + sum(WEIGHTS[name] * value for name, value in result.losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(result.losses.get("entropy", torch.zeros(())).detach())
    return {**quantizer.state_dict(), "entropy": torch.stack(terms)}


def run(folder: Path, world: int, rank: int) -> None:
    """Save the trained state of every quantizer in ``folder``."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = {name: train(config, world, rank) for name, config in (GIVEN | BORN).items()}
    torch.save(found, folder / f"rank{rank}of{world}.pt")
    if world > 1:
        dist.destroy_process_group()
