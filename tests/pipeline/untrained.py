"""Runs whose models were never trained: every kind of tokenizer with a prior in a second."""

import torch
from torch import nn

from data.files import file_sha256
from pipeline.config import load_config
from pipeline.train import first_images
from stages.conditions.encoders import WordEncoder
from stages.factory import build_prior, build_tokenizer
from stages.weights import save_prior, save_tokenizer
from tests.conftest import TINY

KINDS = {
    "sit": (),
    "sit-wavelet-head": ("tokenizer.head.kind=wavelet", "tokenizer.head.width=8", "tokenizer_training.oversampling=2"),
    "sit-words": ("condition.kind=class-text", "tokens.text_encoder=words"),
    "vit-vqgan": ("tokenizer.kind=vit-vqgan", "tokenizer.scales=1", "tokenizer.patch=4", "tokenizer.attention=sit"),
    "nested": ("tokenizer.kind=nested", "tokenizer.num_tokens=6", "tokenizer.patch=4"),
    "bitplane": (
        "tokenizer.kind=bitplane",
        "tokenizer.final_threshold=1.0",
        "tokenizer.wavelet=haar",
        "prior.max_length=40",
    ),
    "sparse-dct": (
        *("tokenizer.kind=sparse-dct", "tokenizer.quality=30", "tokenizer.block=4", "prior.kind=chunked"),
        *("prior.width=32", "prior.heads=4", "prior.encoder_depth=1", "prior.channel_depth=1"),
        *("prior.position_depth=1", "prior.value_depth=1", "prior.chunk=16", "prior.overlap=4"),
    ),
}


def write_run(folder, images, kind, with_prior=True):
    """A run of ``kind`` in ``folder/run``; returns its config's YAML and keys, as commands want them."""
    folder.mkdir(parents=True, exist_ok=True)
    yaml = folder / f"{kind}.yaml"
    yaml.write_text(TINY.format(path=images))
    keys = [f"run={folder}/run", *KINDS[kind]]
    config = load_config(yaml, keys)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.tokenizer, (16, 16), 3)
    tokenizer.fit(first_images(config, 16, []))
    weigh(tokenizer)
    path = folder / "run/tokenizer/tokenizer.safetensors"
    save_tokenizer(path, tokenizer, config.tokenizer, {"steps": 0})
    if with_prior:
        text = WordEncoder(["leaf", "sky"], 4).spec if kind == "sit-words" else None
        prior = build_prior(config.prior, config.condition, tokenizer.layout, ["blue", "green", "red"], text)
        weigh(prior)
        belongs = {"tokenizer_sha256": file_sha256(path), "steps": 0}
        save_prior(folder / "run/prior/prior.safetensors", prior, config.prior, config.condition, belongs)
    return [str(yaml), *keys]


@torch.no_grad()
def weigh(module: nn.Module):
    """Make weights large enough that everything matters."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
