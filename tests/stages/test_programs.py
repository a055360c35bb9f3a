"""Exported programs: equal to the tokenizer for any batch, in a process that imports only torch."""

import subprocess
import sys
from functools import cache

import pytest
import torch

from data.errors import InputError
from data.layout import Tokens
from stages.factory import build_tokenizer
from stages.programs import check_programs, export_programs
from stages.spectral.dct import dct_matrix
from stages.tokenizer.heads import WaveletHeadConfig
from stages.tokenizer.nested import NestedConfig
from stages.tokenizer.quantizers import (
    BSQConfig,
    CosineVQConfig,
    FSQConfig,
    LFQConfig,
    ResidualVQConfig,
    SimVQConfig,
)
from stages.tokenizer.sit import SITConfig, ViTVQGANConfig
from stages.tokenizer.transformer import TransformerConfig
from tests.reliability.cases import fast_are
from tests.stages import bitplanes, dct_lists

FSQ = FSQConfig(levels=[4, 3])
COSINE = CosineVQConfig(codes=16, code_dim=8)
OTHERS = [LFQConfig(), BSQConfig(bits=6, bits_per_field=3), SimVQConfig(codes=16, code_dim=8)]
OTHERS += [ResidualVQConfig(codes=16, code_dim=8), FSQConfig(levels=[8] * 6)]
KINDS = {
    "sit-sc, cosine": (SITConfig, {"scales": 2, "attention": "sit-sc", "quantizer": COSINE}),
    "sit with a head": (SITConfig, {"scales": 2, "quantizer": FSQ, "head": WaveletHeadConfig(width=8)}),
    "vit-vqgan": (ViTVQGANConfig, {"patch": 4, "quantizer": COSINE}),
    "luma apart, CDF 9/7, overlap": (
        SITConfig,
        {"scales": 2, "planes": "ycbcr", "transform": "bior4.4", "overlap": 1, "attention": "sit-sc", "quantizer": FSQ},
    ),
    "sit on db2": (SITConfig, {"scales": 2, "transform": "db2", "quantizer": FSQ}),
    "nested": (NestedConfig, {"num_tokens": 6, "patch": 4, "quantizer": FSQ}),
    "nested, equal widths": (NestedConfig, {"num_tokens": 4, "patch": 4, "widths": [2, 2, 9, 16], "quantizer": COSINE}),
    **{
        f"vit-vqgan, {each.kind} {number}": (ViTVQGANConfig, {"patch": 4, "quantizer": each})
        for number, each in enumerate(OTHERS)
    },
    "nested as in the paper": (NestedConfig, {"num_tokens": 6, "patch": 4, "ring_summaries": 0, "quantizer": FSQ}),
}


def build(kind, seed=0):
    config, keys = KINDS[kind]
    size = TransformerConfig(1, 32, 4)
    torch.manual_seed(seed)
    return build_tokenizer(config(encoder=size, decoder=size, **keys), (16, 16), 3).eval().requires_grad_(False)


@cache
def exported(kind, seed=0):
    return export_programs(build(kind, seed))


def noise(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) * 2 - 1


FAST = ("sit-sc, cosine", "sit with a head", "luma apart, CDF 9/7, overlap", "vit-vqgan, fsq 4", "nested")


@pytest.mark.parametrize("kind", fast_are(FAST, KINDS))
def test_programs_are_the_tokenizer_for_any_batch(kind):
    tokenizer = build(kind)
    encode, decode = (exported(kind)[name].module() for name in ("encoder", "decoder"))
    for count in (1, 2, 3, 7):
        tokens = tokenizer.encode(noise(count))
        assert torch.equal(encode(noise(count)), tokens.ids)
        assert torch.equal(decode(tokens.ids), tokenizer.decode(tokens))
    vocabulary = tokenizer.layout.max_vocabulary_size
    for wrong in (-1, vocabulary):
        ids = tokens.ids.clone()
        ids[0, 1] = wrong
        with pytest.raises(RuntimeError, match=f"is not 0 to {vocabulary - 1}"):
            decode(ids)
        with pytest.raises(InputError, match=f"allowed: 0 to {vocabulary - 1}"):
            tokenizer.decode(Tokens.fixed(ids))


def test_exporting_leaves_the_tokenizer_as_it_was():
    """Transforms cache computed matrices; a cached tensor of the tracer would break every later call."""
    tokenizer, fresh = build("nested"), noise(3)
    before = tokenizer.encode(fresh)
    dct_matrix.cache_clear()
    export_programs(tokenizer)
    assert torch.equal(tokenizer.encode(fresh).ids, before.ids)
    assert torch.equal(tokenizer.decode(before), build("nested").decode(before))


def test_programs_of_other_weights_are_found_out():
    with pytest.raises(InputError, match="the exported encoder gives other ids"):
        check_programs(exported("vit-vqgan"), build("vit-vqgan", seed=1))
    changed = build("vit-vqgan")
    changed.heads[0].bias += 0.1
    with pytest.raises(InputError, match="the exported decoder gives other pixels"):
        check_programs(exported("vit-vqgan"), changed)


@pytest.mark.parametrize("codec", [bitplanes.codec(), dct_lists.codec()], ids=["bit-planes", "lists"])
def test_codecs_have_no_programs(codec):
    with pytest.raises(InputError, match="has no network that could be exported"):
        export_programs(codec)


def test_saved_programs_need_torch_alone(tmp_path):
    tokenizer = build("nested")
    for name, program in exported("nested").items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
    tokens = tokenizer.encode(noise(3))
    torch.save((noise(3), tokens.ids, tokenizer.decode(tokens)), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "for name in ('octaves', 'data', 'stages', 'pipeline'): sys.modules[name] = None\n"
        "encode, decode = (torch.export.load(f'{name}.pt2').module() for name in ('encoder', 'decoder'))\n"
        "pixels, ids, decoded = torch.load('expected.pt')\n"
        "assert torch.equal(encode(pixels), ids) and torch.equal(decode(ids), decoded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
