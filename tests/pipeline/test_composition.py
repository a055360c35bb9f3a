"""The parts compose: every legal combination runs at toy size, every other one is refused with one line."""

import itertools

import pytest
import torch

from pipeline import rules
from pipeline.config import ConfigError, check_command, load_config
from stages.contract import Prompts
from stages.factory import QUANTIZERS, TOKENIZERS, build_prior, build_tokenizer
from stages.prior.config import AVERAGING, AVERAGING_BORDERS
from stages.prior.sampling import sample
from stages.tokenizer.module import TokenizerModule
from tests.conftest import TINY

TEXT = {"encoder": "minilm", "max_tokens": 4, "width": 384, "empty_length": 2}
SIZES = {  # what makes each kind small
    "sit": ["attention=sit", "scales=2", "patch=2"],
    "vit-vqgan": ["patch=4", "scales=1"],
    "nested": ["num_tokens=3", "patch=4"],
    "bitplane": ["wavelet=haar", "final_threshold=1.0"],
    "sparse-dct": ["block=4"],
}
LEARNED = ("sit", "vit-vqgan", "nested")
CODEBOOK = ["codes=16", "code_dim=4"]
QUANTISED = {  # keys and fields of each kind of quantiser
    "fsq": (["levels=[8,8,8,8,8,8]"], 2),
    "lfq": (["bits=18"], 2),
    "bsq": (["bits=6"], 1),
    "cosine": (CODEBOOK, 1),
    "simvq": (CODEBOOK, 1),
    "residual": ([*CODEBOOK, "depth=3"], 3),
}
ORDERS = ("natural", "reversed", "interleaved", "luma_first", "scale")
CONDITIONS = ("none", "class", "text", "class-text")
WINDOWS = (("none", "sample"), *itertools.product(AVERAGING[1:], AVERAGING_BORDERS))


def legal(kind, prior, order, averaging, borders, head):
    """What should compose, said apart from the table of what must not."""
    if head == "wavelet" and kind not in LEARNED:
        return False
    if (kind == "sparse-dct") != (prior == "chunked"):
        return False
    if prior == "chunked":
        return averaging == "none" and order in ("natural", "luma_first")
    if order == "luma_first" or (order != "natural" and kind == "bitplane"):
        return False
    if order in ("interleaved", "scale") and kind == "nested":
        return False
    if order == "interleaved" and kind == "vit-vqgan":  # one scale: that is the natural order
        return False
    if averaging != "none" and (order == "scale" or (order == "interleaved" and borders != "sample")):
        return False
    if averaging == "learned" and borders == "grid":
        return False
    return averaging == "none" or borders == "sample" or kind in ("sit", "vit-vqgan")


def overrides(kind, prior, order, averaging, borders, head, condition):
    keys = [f"tokenizer.kind={kind}", *(f"tokenizer.{key}" for key in SIZES[kind])]
    keys += [f"prior.kind={prior}", f"prior.order={order}", f"condition.kind={condition}"]
    keys += ["prior.depth=1"] if prior == "transformer" else ["prior.encoder_depth=1", "prior.chunk=50"]
    if averaging != "none":
        keys += [f"prior.averaging={averaging}", f"prior.averaging_borders={borders}"]
    if head != "none":
        keys += [f"tokenizer.head.kind={head}", "tokenizer.head.width=4", "tokenizer.head.crop=4"]
        keys.append("tokenizer_training.oversampling=2")
    if condition == "none":
        keys.append("sampling.guidance=1")
    return [*keys, "tokens.text_encoder=minilm" if "text" in condition else "tokens.text_encoder=none"]


@pytest.fixture
def plain(tmp_path):
    """The toy YAML with gray-free images of 8 px, and without what only SIT's section has."""
    path = tmp_path / "toy.yaml"
    text = TINY.format(path=tmp_path).replace("size: 16", "size: 8")
    text = text.replace("prior: {depth: 1, width: 32, heads: 4}", "prior: {width: 32, heads: 4}")
    path.write_text(text)
    return path


def combinations(kinds):
    return itertools.product(kinds, ("transformer", "chunked"), ORDERS, WINDOWS, ("none", "wavelet"))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_cannot_work_together_is_refused_with_one_line_and_nothing_else_is(plain, kind):
    refused, configs = 0, {}
    for kind_, prior, order, (averaging, borders), head in combinations([kind]):
        if prior == "chunked" and averaging != "none" and (order, head) != ("natural", "none"):
            continue  # it has no such key, whatever the rest
        broken = refusal(plain, configs, kind_, prior, order, averaging, borders, head)
        if legal(kind_, prior, order, averaging, borders, head):
            assert broken is None
            continue
        assert broken and "\n" not in broken and len(broken) > 20, (prior, order, averaging, borders, head)
        refused += 1
    assert refused > 30


def refusal(plain, configs, kind, prior, order, averaging, borders, head):
    """What a config of these parts is refused with; None where it is not.

    Those that differ in an order and an average alone are one loaded config of ``configs`` with other values.
    """
    if kind == "sparse-dct" or prior == "chunked" or (head != "none" and kind not in LEARNED):
        try:
            load_config(plain, overrides(kind, prior, order, averaging, borders, head, "class"))
        except ConfigError as error:
            return str(error)
        return None
    if head not in configs:
        configs[head] = load_config(plain, overrides(kind, prior, "natural", "none", "sample", head, "class"))
    config = configs[head]
    config.prior.order, config.prior.averaging, config.prior.averaging_borders = order, averaging, borders
    return rules.broken_rule(config)


def test_what_is_refused_of_a_built_config_is_refused_of_a_written_one(plain):
    for parts in (
        ("sit", "transformer", "interleaved", "mix", "grid", "none"),
        ("vit-vqgan", "transformer", "interleaved", "none", "sample", "wavelet"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(plain, overrides(*parts, "class"))
        assert str(caught.value) == refusal(plain, {}, *parts)


def test_an_order_is_judged_once_and_defects_of_tokenizers_show(plain, monkeypatch):
    keys = overrides("vit-vqgan", "transformer", "interleaved", "none", "sample", "none", "class")
    built = []
    monkeypatch.setattr(rules, "build_tokenizer", lambda *a: (built.append(a), build_tokenizer(*a))[1])
    with pytest.raises(ConfigError, match=r"is the natural order of these tokens.*\(tokenizer.kind=vit-vqgan\)"):
        load_config(plain, keys)
    assert len(built) == 1

    def broken(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(rules, "build_tokenizer", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        load_config(plain, keys)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_prior_but_the_chunked_one_may_be_shared_out(plain, kind):
    prior = "chunked" if kind == "sparse-dct" else "transformer"
    keys = [*overrides(kind, prior, "natural", "none", "sample", "none", "class"), "trainer.strategy=fsdp"]
    if prior == "transformer":
        assert load_config(plain, keys).trainer.strategy == "fsdp"
        return
    with pytest.raises(ConfigError, match="trainer.strategy=fsdp with prior.kind=chunked"):
        load_config(plain, keys)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("prior_training.shuffle_shards=-1", "prior_training.shuffle_shards=-1; allowed: 0 or more"),
        ("tokens.local_gigabytes=0", "tokens.local_gigabytes=0.0; allowed: above 0"),
        ("trainer.strategy=zero", "trainer.strategy='zero'; allowed: ddp, fsdp"),
    ],
)
def test_values_out_of_range_are_refused(plain, key, said):
    with pytest.raises(ConfigError) as caught:
        load_config(plain, [key])
    assert str(caught.value) == said


def test_commands_refuse_what_only_others_can_do(plain):
    url, shared = load_config(plain, ["tokens.path=s3://bucket/tokens"]), load_config(plain, ["trainer.strategy=fsdp"])
    for command, config in (("cache-tokens", url), ("text-tokens", url), ("train-tokenizer", shared)):
        with pytest.raises(ConfigError) as caught:
            check_command(command, config)
        assert "\n" not in str(caught.value)
    for command, config in (("train-prior", url), ("train-tokenizer", url), ("cache-tokens", shared)):
        check_command(command, config)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_can_work_together_does(plain, kind):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    labels = torch.tensor([0, 1])
    text = Prompts(labels, torch.randn(2, 3, 384, generator=generator), torch.tensor([3, 2]))
    tokenizers = {}
    ran = 0
    for kind_, prior_kind, order, (averaging, borders), head in combinations([kind]):
        if not legal(kind_, prior_kind, order, averaging, borders, head):
            continue
        # every condition with the plain form of the rest, and one with each
        every = averaging == "none" and head == "none"
        for condition in CONDITIONS if every else [CONDITIONS[ran % len(CONDITIONS)]]:
            keys = overrides(kind_, prior_kind, order, averaging, borders, head, condition)
            config = load_config(plain, keys)
            if head not in tokenizers:
                tokenizers[head] = step_of_stage_one(config, pixels, labels)
            tokenizer = tokenizers[head]
            step_of_stage_two(config, tokenizer, pixels, text if "text" in condition else Prompts.of_labels(labels))
            ran += 1
    assert ran >= 7


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantiser_works_with_every_learned_tokenizer_order_and_average(plain, kind, quantizer):
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1, torch.tensor([0, 1])
    keys, num_fields = QUANTISED[quantizer]
    gradients = ("straight-through", "rotation") if quantizer in ("cosine", "simvq", "residual") else (None,)
    for gradient in gradients:
        chosen = [f"kind={quantizer}", *keys, *([f"gradient={gradient}"] if gradient else [])]
        chosen = [f"tokenizer.quantizer.{key}" for key in chosen]
        for order, (averaging, borders) in itertools.product(("natural", "reversed"), WINDOWS[:2]):
            if not legal(kind, "transformer", order, averaging, borders, "none"):
                continue
            config = load_config(
                plain, [*overrides(kind, "transformer", order, averaging, borders, "none", "class"), *chosen]
            )
            tokenizer = step_of_stage_one(config, pixels, labels)
            assert tokenizer.layout.num_fields == num_fields
            step_of_stage_two(config, tokenizer, pixels, Prompts.of_labels(labels))


REFUSED = {
    "kind=lfq": ["bits=0", "bits=65", "bits_per_field=17", "entropy_group_bits=0", "temperature=0", "temperature=nan"],
    "kind=bsq": ["bits_per_field=0", "entropy_group_bits=19", "temperature=-1"],
    "kind=cosine": ["codes=1", "code_dim=0", "gradient=none"],
    "kind=simvq": ["codes=65537", "gradient=ste"],
    "kind=residual": ["depth=0", "codes=0", "gradient=rotate"],
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in REFUSED.items() for key in keys])
def test_values_that_make_no_quantiser_are_refused_with_one_line(plain, kind, key):
    with pytest.raises(ConfigError) as caught:
        load_config(plain, [f"tokenizer.quantizer.{kind}", f"tokenizer.quantizer.{key}"])
    said = str(caught.value)
    assert "\n" not in said and f"tokenizer.quantizer.{key.split('=')[0]}=" in said and "allowed: " in said


def step_of_stage_one(config, pixels, labels):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.tokenizer, (8, 8), 3)
    tokenizer.fit([(pixels, labels)])
    if tokenizer.trainable:
        terms, _, _ = TokenizerModule(tokenizer.train(), config.tokenizer_training, 0).loss_terms(pixels)
        assert ("head" in terms) == (config.tokenizer.head.kind != "none")
        sum(terms.values()).backward()
        assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    return tokenizer.eval()


@torch.enable_grad()
def step_of_stage_two(config, tokenizer, pixels, prompts):
    tokens = tokenizer.encode(pixels)
    prior = build_prior(config.prior, config.condition, tokenizer.layout, ["a", "b"], TEXT)
    output = prior(tokens, prompts)
    assert torch.isfinite(output.nll).all() and output.nll.shape == tokens.ids.shape
    output.nll.mean().backward()
    prefix = tokenizer.start_prefix(prompts.labels, [0, 1])
    drawn = sample(prior.eval(), prompts, config.sampling, [0, 1], prefix)
    decoded = tokenizer.decode(drawn)
    assert decoded.shape == pixels.shape and torch.isfinite(decoded).all()
    if getattr(config.tokenizer, "head", None) and config.tokenizer.head.kind != "none":
        assert tokenizer.render(drawn, (5, 11)).shape == (2, 3, 5, 11)


TRANSFORMS = ("identity", "haar", "bior4.4", "db2", "bior3.3")
COEFFICIENTS = list(itertools.product(TRANSFORMS, (0, 1, 9), ("all", "ycbcr", "hsv")))


def with_coefficients(keys, transform, overlap, planes):
    return [*keys, f"tokenizer.transform={transform}", f"tokenizer.overlap={overlap}", f"tokenizer.planes={planes}"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_coefficients_are_refused_or_composed(plain, kind, channels):
    """Wavelets, overlap and planes: SIT and ViT-VQGAN alone have them."""
    prior, accepted = "chunked" if kind == "sparse-dct" else "transformer", []
    keys = [*overrides(kind, prior, "natural", "none", "", "none", "class"), f"images.channels={channels}"]
    if kind not in ("sit", "vit-vqgan"):
        for key in with_coefficients([], *COEFFICIENTS[0]):
            with pytest.raises(ConfigError, match=f"Key '{key.split('=')[0].removeprefix('tokenizer.')}' not in"):
                load_config(plain, [*keys, key])
        return
    config = load_config(plain, [*keys, "tokenizer.transform=haar"])
    for each in COEFFICIENTS:
        config.tokenizer.transform, config.tokenizer.overlap, config.tokenizer.planes = each
        broken = rules.broken_rule(config)
        assert broken is None or ("\n" not in broken and len(broken) > 20)
        accepted += [each] if broken is None else []
    wanted = [
        (transform, overlap, planes)
        for transform, overlap, planes in COEFFICIENTS
        if transform in TRANSFORMS[1 if kind == "sit" else 0 : 4]  # sit has two scales here
        and overlap < 9
        and (planes == "all" or (planes == "ycbcr" and channels == 3))
    ]
    assert accepted == wanted


@pytest.mark.parametrize("head", ["none", "wavelet"])
@pytest.mark.parametrize("attention", ["sit", "sit-sc", "sit-sce"])
@pytest.mark.parametrize("each", [("bior4.4", 1, "all"), ("haar", 0, "ycbcr"), ("db2", 1, "ycbcr")])
def test_coefficients_compose_with_the_rest(plain, each, attention, head):
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels, tokenizer = torch.tensor([0, 1]), None
    orders = [("natural", "none", ""), ("reversed", "replace", "grid"), ("scale", "none", "")]
    orders += [("luma_first", "mix", "scale")] if each[2] == "ycbcr" else []
    for order, averaging, borders in orders:
        keys = with_coefficients(overrides("sit", "transformer", order, averaging, borders, head, "class"), *each)
        config = load_config(plain, [*keys, f"tokenizer.attention={attention}"])
        tokenizer = tokenizer or step_of_stage_one(config, pixels, labels)
        step_of_stage_two(config, tokenizer, pixels, Prompts.of_labels(labels))
