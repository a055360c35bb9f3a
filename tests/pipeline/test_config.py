"""Config: every shipped experiment builds, and a mistake ends before any work with one line."""

import dataclasses

import pytest
import torch

from data.layout import Tokens
from pipeline.config import CONFIG_FOLDER, ConfigError, load_config, to_plain
from pipeline.ranges import ALLOWED, BETWEEN, RANGES, get
from stages.contract import Prompts
from stages.factory import QUANTIZERS, build_prior, build_tokenizer
from stages.tokenizer.module import TokenizerModule
from stages.tokenizer.transformer import TransformerConfig

TEXT = {"encoder": "minilm", "max_tokens": 16, "width": 384, "empty_length": 2}
SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
CODECS = [name for name in SHIPPED if not hasattr(load_config(name).tokenizer, "encoder")]


def test_the_shipped_experiments_are_there():
    assert {"demo", "fashion", "photos64", "imagenet256"} <= set(SHIPPED)


def test_every_rule_is_about_a_key_that_there_is():
    found = [load_config(name) for name in SHIPPED]
    found += [load_config("demo", [f"tokenizer.quantizer.kind={kind}"]) for kind in QUANTIZERS]
    for key in (*ALLOWED, *BETWEEN, *(key for keys, *_ in RANGES for key in keys)):
        assert any(get(config, key) is not None for config in found), key


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_config_builds_at_full_size(name):
    config = load_config(name)
    with torch.device("cpu" if name in CODECS else "meta"):  # codecs are small, and tables of theirs are read
        tokenizer = build_tokenizer(config.tokenizer, (config.images.size,) * 2, config.images.channels)
        prior = build_prior(config.prior, config.condition, tokenizer.layout, ["a", "b"], TEXT)
    assert tokenizer.layout.image_size == (config.images.size, config.images.size)
    assert sum(parameter.numel() for parameter in prior.parameters()) > 1e6


@pytest.mark.parametrize("name", CODECS)
def test_each_shipped_codec_takes_one_scaled_down_step_of_the_prior(name):
    torch.manual_seed(0)
    config = load_config(name)
    side = config.images.size
    tokenizer = build_tokenizer(config.tokenizer, (side, side), config.images.channels)
    assert not tokenizer.trainable
    pixels, labels = torch.rand(2, config.images.channels, side, side) * 2 - 1, torch.tensor([0, 1])
    tokenizer.fit([(pixels, labels)])
    tokens = tokenizer.encode(pixels)
    assert tokenizer.decode(tokens).shape == pixels.shape
    depths = {key: 1 for key in ("depth", "encoder_depth", "channel_depth") if hasattr(config.prior, key)}
    prior_config = dataclasses.replace(config.prior, **depths, width=32, heads=4)
    prior = build_prior(prior_config, config.condition, tokenizer.layout, ["a", "b"], TEXT)
    nll = prior.nll(tokens.prefix(100), Prompts.of_labels(labels))
    nll.mean().backward()
    assert nll.shape == (2, 100, tokenizer.layout.num_fields) and torch.isfinite(nll).all()


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in CODECS])
def test_each_shipped_config_takes_one_scaled_down_step_of_both_stages(name):
    torch.manual_seed(0)
    config = load_config(name)
    small = TransformerConfig(depth=1, width=32, heads=4)
    side = 2 ** (getattr(config.tokenizer, "scales", 1) - 1) * config.tokenizer.patch * 2
    tokenizer_config = dataclasses.replace(config.tokenizer, encoder=small, decoder=small)
    training = dataclasses.replace(config.tokenizer_training, perceptual="none", discriminator_width=8)
    tokenizer = build_tokenizer(tokenizer_config, (side, side), config.images.channels)
    pixels = torch.rand(2, config.images.channels, side, side) * 2 - 1
    tokenizer.fit([(pixels, None)])
    terms, _, ids = TokenizerModule(tokenizer, training, 0).loss_terms(pixels)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    prior_config = dataclasses.replace(config.prior, depth=1, width=32, heads=4)
    prior = build_prior(prior_config, config.condition, tokenizer.layout, ["a", "b"], TEXT)
    nll = prior.nll(Tokens.fixed(ids), Prompts.of_labels(torch.tensor([0, 1])))
    nll.mean().backward()
    assert nll.shape == ids.shape and torch.isfinite(nll).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.scalse=4", "scalse"),
        ("prior_training.max_steps=many", "many"),
        ("tokenizer.kind=vqgan", "tokenizer.kind='vqgan'; allowed: bitplane, nested, sit, sparse-dct, vit-vqgan"),
        ("tokenizer.quantizer.kind=ema", "kind='ema'; allowed: bsq, cosine, fsq, lfq, residual, simvq"),
        ("prior.kind=rnn", "prior.kind='rnn'; allowed: chunked, transformer"),
        ("images.kind=cifar", "images.kind='cifar'; allowed: folder, webdataset, fashion, demo, photos"),
        ("images.size=0", "images.size=0; allowed: 1 or more"),
        ("images.size=null", "size"),
        ("--seed=1", "is not an override; write key=value"),
        ("seed", "is not an override"),
        ("trainer.devices=0", "trainer.devices=0; allowed"),
        ("images.crop_scale=[0.5,1.5]", "images.crop_scale"),
        ("images.kind=folder", "images.path is not set"),
        ("tokenizer_training.perceptual=vgg", "perceptual"),
        ("condition.dropout=1.5", "condition.dropout"),
        ("condition.dropout=0", "with condition.kind=class and condition.dropout=0.0"),
        ("condition.kind=none", "set sampling.guidance=1"),
        ("condition.kind=text", "condition.kind=text with tokens.text_encoder=none: captions need an encoder"),
        ("condition.attend=cross", "attend"),
        (
            "tokenizer.kind=sparse-dct",
            "lists need a chunked prior, and it needs lists; set prior.kind=chun",
        ),
        ("prior.kind=chunked", "set prior.kind=transformer"),
        ("prior.averaging=ema", "prior.averaging='ema'; allowed: none, replace, mix, learned"),
        ("prior.averaging_borders=row", "prior.averaging_borders='row'; allowed: sample, scale, grid"),
        (
            "eval.num_colorized=8",
            "eval.num_colorized=8 with prior.order=natural: colorization needs a prior that writes",
        ),
        ("tokenizer_training.oversampling=2", "oversampling=2 without a head: only a head learns from larger images"),
        ("tokenizer_training.start_from=x", "start_from=x without a head: nothing is left to train"),
        ("eval.head_sizes=[2]", "eval.head_sizes=[2.0] without a head: set tokenizer.head.kind=wavelet"),
        ("tokenizer.head.width=0", "Key 'width' not in 'HeadConfig'"),
        (
            "tokenizer.head.kind=wavelet",
            "with tokenizer_training.oversampling=1: a head learns other sizes from larger",
        ),
        ("tokenizer.head=wavelet", "tokenizer.head=wavelet is a section; write tokenizer.head.kind=wavelet"),
        ("tokenizer=nested", "tokenizer=nested is a section; write tokenizer.kind=nested"),
        ("tokenizer.head.kind=siren", "tokenizer.head.kind='siren'; allowed: none, wavelet"),
        ("tokenizer.head.cell=2", "Key 'cell' not in 'HeadConfig'"),
        ("prior.order=raster", "prior.order='raster'; allowed with prior.kind=transformer: natural, reversed"),
        ("prior.order=luma_first", "prior.order=luma_first needs scales of luma and of chroma; these tokens have none"),
        ("sampling.rounds=[8,4]", "prior.order=natural: this order has no rounds; leave them out"),
        ("tokenizer.encoder.heads=0", "tokenizer.encoder.heads=0; allowed: 1 or more"),
        ("prior_training.log_every=0", "prior_training.log_every=0; allowed: 1 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError, match=None) as caught:
        load_config("demo", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_kind_picks_the_keys_of_its_section():
    config = load_config("demo", ["tokenizer.quantizer.kind=cosine"])
    assert config.tokenizer.quantizer.codes == 1024 and config.tokenizer.patch == 1
    config = load_config("demo", ["tokenizer.kind=vit-vqgan", "tokenizer.scales=1", "tokenizer.patch=8"])
    assert config.tokenizer.transform == "identity" and config.tokenizer.encoder.width == 128
    with pytest.raises(ConfigError, match="levels"):
        load_config("demo", ["tokenizer.quantizer.kind=cosine", "tokenizer.quantizer.levels=[2,2]"])


def test_a_part_that_a_kind_does_not_have_is_named():
    with pytest.raises(ConfigError, match="tokenizer.head is set, but tokenizer.kind=bitplane has no head; leave it"):
        load_config("fashion-bitplane", ["tokenizer.head.kind=wavelet"])
    with pytest.raises(ConfigError, match="tokenizer.quantizer is set, but tokenizer.kind=sparse-dct has no quantizer"):
        load_config("fashion-dct", ["tokenizer.quantizer.kind=fsq"])
    # another kind from the command line takes the YAML's other parts away with it
    assert load_config("demo", ["tokenizer.kind=bitplane"]).tokenizer.kind == "bitplane"


def test_a_missing_config_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"CONFIG=nothing: no such file.*demo, demo-dct, .*fashion"):
        load_config("nothing")
    (tmp_path / "broken.yaml").write_text("images: {kind: [}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")


def test_overrides_reach_interpolations_and_the_plain_config():
    config = load_config("demo", ["run=elsewhere"])
    assert config.name == "demo" and config.prior.path == "elsewhere/prior/prior.safetensors"
    assert to_plain(config)["tokenizer"]["quantizer"]["levels"] == [8, 5, 5, 5]


def test_what_is_done_to_a_config_reaches_no_other():
    first, untouched = load_config("demo"), load_config("demo")
    first.sampling.temperature.append(7.0)
    first.prior.width = 1
    first.tokenizer.quantizer.gradient = "?"
    assert load_config("demo") == untouched
