"""Which parameters Muon updates, for every kind of tokenizer, quantiser and prior."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from torch import nn

from pipeline.config import ConfigError, load_config
from stages.contract import Condition
from stages.factory import QUANTIZERS, build_prior, build_tokenizer
from stages.optimizers import build_optimizer, matrices_of
from stages.prior.embeddings import InputEmbedding
from stages.tokenizer.heads import Head
from stages.tokenizer.quantizers import Quantizer
from stages.tokenizer.rings import RingSummaries
from tests.pipeline.untrained import KINDS

TEXT = {"encoder": "minilm", "max_tokens": 4, "width": 8, "empty_length": 1}
TOKENIZER = r"(en|de)coder\.blocks\.\d+\.(query_key_value\.\d|project\.\d|mlp\.\d\.[13])\.weight"
ATTENTION = r"(attention\.query_key_value|cross\.(query|key_value)|(attention|cross)\.project)"
PRIOR = rf"(blocks|encoder|\w+_decoder\.blocks)\.\d+\.({ATTENTION}|mlp\.fc(1_g|1_x|2))\.weight"
PARTS = {"query_key_value": 3, "key_value": 2}
CASES = {
    **KINDS,
    **{f"sit-{kind}": (f"tokenizer.quantizer.kind={kind}",) for kind in QUANTIZERS},
    "scale-order": ("prior.order=scale",),
    "averages": ("prior.averaging=learned",),
    "cross": ("condition.kind=class-text", "condition.attend=cross", "tokens.text_encoder=minilm"),
    "fields": ("tokenizer.quantizer.kind=lfq", "tokenizer.quantizer.bits=8", "tokenizer.quantizer.bits_per_field=4"),
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_muon_updates_the_matrices_of_the_blocks_and_every_parameter_has_one_group(tiny, keys):
    config = load_config(tiny, list(keys))
    tokenizer = build_tokenizer(config.tokenizer, (16, 16), 3)
    prior = build_prior(config.prior, config.condition, tokenizer.layout, ["a", "b"], TEXT)
    networks = [(prior, config.prior_training, PRIOR)]
    if tokenizer.trainable:
        networks.append((tokenizer, config.tokenizer_training, TOKENIZER))
    for network, training, expected in networks:
        optimizer = build_optimizer(network, replace(training, optimizer="muon"))
        grouped = Counter(id(each) for group in optimizer.param_groups for each in group["params"])
        assert grouped == {id(each): 1 for each in network.parameters() if each.requires_grad}
        matrices = matrices_of(network)
        moved = {id(each) for group in optimizer.param_groups if group["matrices"] for each in group["params"]}
        assert moved == {id(each) for each in matrices}
        names = {name for name, each in network.named_parameters() if id(each) in moved}
        assert names == {name for name, _ in network.named_parameters() if re.fullmatch(expected, name)} != set()
        for name in names:
            layer = re.sub(r".*?(\w+)(\.\d)?\.weight", r"\1", name)
            assert matrices[network.get_parameter(name)] == PARTS.get(layer, 1)
        apart = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, Quantizer, Head, Condition, InputEmbedding, RingSummaries)
        for module in network.modules():
            if isinstance(module, apart):
                assert not moved & {id(each) for each in module.parameters()}


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize(
    ("key", "allowed"),
    [("optimizer=sgd", "adamw, muon"), ("matrix_learning_rate=0", "above 0"), ("learning_rate=inf", "above 0")],
)
def test_what_is_no_optimiser_and_no_rate_is_refused(stage, key, allowed):
    with pytest.raises(ConfigError, match=f"{stage}_training.{key.split('=')[0]}=.*; allowed: {allowed}"):
        load_config("demo", [f"{stage}_training.{key}"])
