"""plan: counted costs agree with direct ones and with arithmetic; the large configs have the sizes they claim."""

import dataclasses
import json

import pytest
import torch

from pipeline.__main__ import main
from pipeline.config import load_config
from pipeline.plan import prior_cost, prior_cost_of, tokenizer_cost, tokenizer_cost_of
from stages.factory import build_prior, build_tokenizer
from stages.measures.memory import saved_bytes

# depth, width and vocabularies of each prior, what these imply, and what the papers say
PRIORS = {
    "imagenet256": (24, 1024, 2 * 8192, "350 M (AR-SIT-4*)"),
    "imagenet256-sit5": (24, 1536, 2 * 8192, "650 M (VIM-Base's shape)"),
    "imagenet512": (24, 1024, 2 * 8192, "none"),
    "imagenet256-spectralar": (24, 1024, 4096, "310 M (SpectralAR-d16)"),
}
TOKENS = {"imagenet256": 1024, "imagenet256-sit5": 1280, "imagenet512": 1536, "imagenet256-spectralar": 64}


@pytest.mark.parametrize("name", PRIORS)
def test_large_priors_have_as_many_parameters_as_their_depth_and_width_imply(name):
    depth, width, vocabulary, paper = PRIORS[name]
    config = load_config(name)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config.tokenizer, (config.images.size,) * 2, 3)
        prior = build_prior(config.prior, config.condition, tokenizer.layout, [str(number) for number in range(1000)])
    assert tokenizer.layout.length == TOKENS[name]
    found = sum(parameter.numel() for parameter in prior.parameters())
    # attention 4 w², SwiGLU with two thirds of 4 w hidden units 3 · (8/3) w², embeddings and heads of each id, classes
    implied = depth * 12 * width**2 + 2 * vocabulary * width + 1000 * width
    print(f"{name}: {found / 1e6:.1f} M, implied {implied / 1e6:.1f} M, paper: {paper}")
    assert found == pytest.approx(implied, rel=0.02)


def small(**keys):
    """The demo with narrow networks."""
    config = load_config("demo", ["prior.width=32", "prior.heads=2", "prior.dropout=0"])
    parts = {
        part: dataclasses.replace(getattr(config.tokenizer, part), width=32, heads=2, depth=keys.get(part, 1))
        for part in ("encoder", "decoder")
    }
    tokenizer = dataclasses.replace(config.tokenizer, **parts)
    prior = dataclasses.replace(config.prior, depth=keys.get("prior", 1))
    return dataclasses.replace(config, tokenizer=tokenizer, prior=prior)


def layout_of(config):
    return build_tokenizer(config.tokenizer, (32, 32), 3).layout


def test_a_prior_costs_six_flops_a_weight_and_token_and_every_layer_the_same():
    config = small(prior=4)
    layout = layout_of(config)
    found = prior_cost(config, layout)
    width, length = 32, layout.length
    hidden = round(width * 8 / 3 / 8) * 8
    weights = 4 * (4 * width**2 + 3 * width * hidden) + width * 1000
    attention = 4 * 2 * 2 * length**2 * width * 3
    assert found.flops == pytest.approx(6 * weights * length + attention, rel=0.03)
    # what is added up from one and two layers is what four cost
    counted = prior_cost_of(config, layout, {"depth": 4})
    assert found.flops == counted.flops and found.saved == pytest.approx(counted.saved, rel=1e-3)


def test_a_tokenizer_costs_what_its_layers_add_up_to():
    config = small(encoder=3, decoder=2)
    found, counted = tokenizer_cost(config), tokenizer_cost_of(config, {"encoder": 3, "decoder": 2})
    assert found.flops == counted.flops and found.saved == pytest.approx(counted.saved, rel=1e-3)


def test_what_is_kept_is_counted_once_and_without_weights():
    layer = torch.nn.Linear(10, 20, bias=False)
    x = torch.randn(5, 10, requires_grad=True)
    # the input of the layer, and the factor by which the gradient of the product goes on
    losses = []
    saved = saved_bytes(lambda: losses.append((layer(x) * layer(x).detach()).sum()), layer)
    assert saved == {"rest": 4 * (5 * 10 + 5 * 20)}
    losses[0].backward()
    assert x.grad is not None


def test_the_table_is_printed_and_written(tmp_path, capsys):
    out = tmp_path / "plan.json"
    keys = [f"out={out}", "gpus=4", "utilisation=0.5", "teraflops=100", "prior.width=64", "prior.heads=2"]
    keys += ["prior_training.max_steps=1000", "prior_training.batch_size_per_device=64"]
    assert main(["plan", "demo", *keys]) == 0
    found = json.loads(out.read_text())
    prior = found["stages"]["prior"]
    assert prior["samples_per_second"] == pytest.approx(4 * 0.5 * 100e12 / prior["flops_per_sample"])
    assert prior["days"] == pytest.approx(1000 * 64 * 4 / prior["samples_per_second"] / 86400)
    assert prior["state_gigabytes"] == pytest.approx(prior["parameters"] * 20e-9)
    assert f"| {prior['parameters'] / 1e6:.1f} |" in capsys.readouterr().out


def test_a_shared_out_prior_keeps_its_share_and_what_is_gathered(tmp_path):
    keys = ["gpus=8", "prior.width=64", "prior.heads=2", "prior.depth=6", "prior.dropout=0"]
    found = {}
    for strategy in ("ddp", "fsdp"):
        assert main(["plan", "demo", f"out={tmp_path}/plan.json", f"trainer.strategy={strategy}", *keys]) == 0
        found[strategy] = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert found["ddp"]["tokenizer"] == found["fsdp"]["tokenizer"]
    parameters = found["ddp"]["prior"]["parameters"]
    layer = 4 * 64**2 + 3 * 64 * (round(64 * 8 / 3 / 8) * 8) + 2 * 64  # attention, SwiGLU, two norms
    gathered = parameters - 6 * layer + 2 * layer
    expected = (20 * parameters / 8 + 8 * gathered) / 1e9
    assert found["fsdp"]["prior"]["state_gigabytes"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["utilisation=40"], "utilisation=40.0; allowed: 0.001 to 1"),
        (["gpus=0"], "gpus=0; allowed: 1 to"),
        (["tokenizer.kind=bitplane"], "only learned tokenizers with a fixed length can be planned"),
    ],
)
def test_impossible_plans_are_refused(tmp_path, capsys, keys, message):
    assert main(["plan", "demo", f"out={tmp_path}/plan.json", *keys]) == 2
    assert message in capsys.readouterr().err
