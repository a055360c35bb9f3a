"""One experiment: dataclass defaults, then a YAML, then ``key=value`` from the command line.

Each component's dataclass stands next to its owner. ``kind`` keys pick a dataclass before the YAML is merged, so an
unknown key, a wrong type or an impossible combination ends here, with one line, before any work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import OctavesError
from data.images.config import ImagesConfig
from data.tokens.config import TokensConfig
from stages.conditions.config import ConditionConfig
from stages.factory import condition_kind, head_kind, prior_kind, quantizer_kind, tokenizer_kind
from stages.lists import ORDERS
from stages.measures.config import EvalConfig
from stages.prior.config import AVERAGING, AVERAGING_BORDERS, FIXED_ORDERS, PriorConfig, PriorTrainingConfig
from stages.prior.sampling import SamplingConfig
from stages.tokenizer.config import TokenizerConfig, TokenizerTrainingConfig

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(OctavesError, ValueError):
    """A config that cannot run; the message is one line for the person who wrote it."""


@dataclass
class TrainerConfig:
    """Where the work runs. Nothing here changes a result on purpose, so it may differ between two calls of one run."""

    accelerator: str = "auto"
    """auto, cpu or gpu."""
    devices: int = 1
    """Processes on this machine; -1: every GPU."""
    num_nodes: int = 1
    """Machines."""
    num_workers: int = 0
    """Loader processes for each training process; 0 loads in the training process itself, best for few cores."""
    progress: bool = True
    """Show progress bars."""


@dataclass
class Config:
    """A whole experiment."""

    name: str = "experiment"
    """Name of the run; default: the YAML's file name."""
    run: str = "runs/${name}"
    """Folder of the run."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokenizer_training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    prior_training: PriorTrainingConfig = field(default_factory=PriorTrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


# Keys whose value picks the dataclass of the section they stand in. Outer sections come first.
KINDS: dict[str, tuple[str, Callable[[str], tuple[type[Any], Any]]]] = {
    "tokenizer": ("sit", tokenizer_kind),
    "tokenizer.quantizer": ("fsq", quantizer_kind),
    "tokenizer.head": ("none", head_kind),
    "condition": ("class", condition_kind),
    "prior": ("transformer", prior_kind),
}

ALLOWED: dict[str, tuple[Any, ...]] = {
    "images.kind": ("folder", "webdataset", "fashion", "demo", "photos"),
    "images.channels": (1, 3),
    "images.train_view": ("center", "random_resized_crop", "random_crop", "pad"),
    "images.eval_view": ("center", "pad"),
    "tokens.precision": ("32", "bf16"),
    "tokenizer_training.precision": ("32", "bf16"),
    "tokenizer_training.perceptual": ("lite0", "lpips-vgg", "none"),
    "tokenizer_training.discriminator": ("patch", "style"),
    "tokenizer_training.adversarial_loss": ("hinge", "logistic"),
    "prior_training.precision": ("32", "bf16"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
}

SHARES = (
    "images.val_share",
    "images.max_corrupt_share",
    "condition.dropout",
    "prior.dropout",
    "tokenizer_training.ema_decay",
    "prior_training.ema_decay",
)

POSITIVE = (
    "images.size",
    "tokens.encode_batch_size",
    "tokens.blocks_per_shard",
    "tokens.max_caption_tokens",
    "tokens.vocabulary_size",
    "tokenizer_training.max_steps",
    "tokenizer_training.batch_size_per_device",
    "tokenizer_training.accumulate_batches",
    "prior_training.max_steps",
    "prior_training.batch_size_per_device",
    "prior_training.accumulate_batches",
    "prior_training.bucket_batches",
    "tokenizer_training.log_every",
    "tokenizer_training.checkpoint_every",
    "tokenizer_training.validate_every",
    "tokenizer_training.validation_images",
    "tokenizer_training.fit_images",
    "tokenizer_training.r1_every",
    "tokenizer_training.oversampling",
    "prior_training.log_every",
    "prior_training.checkpoint_every",
    "prior_training.validate_every",
    "prior_training.validation_samples",
    "eval.num_images",
    "eval.num_samples",
    "eval.batch_size",
    "eval.neighbours",
    "eval.num_upsampled",
    "eval.num_edited",
    "eval.num_head",
)

# Sizes of networks, checked where the chosen kinds have them.
NETWORK_SIZES = (
    *(f"tokenizer.{part}.{key}" for part in ("encoder", "decoder") for key in ("depth", "width", "heads")),
    *(f"prior.{key}" for key in ("depth", "width", "heads", "max_length", "chunk", "overlap", "patch")),
    *(f"prior.{part}_depth" for part in ("encoder", "channel", "position", "value")),
)


def find_config(name: str | Path) -> Path:
    """The YAML of a path, or of a shipped experiment's name. Raises ConfigError that lists the shipped ones."""
    for candidate in (Path(name), CONFIG_FOLDER / f"{name}.yaml", CONFIG_FOLDER / str(name)):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise ConfigError(f"CONFIG={name}: no such file, and no shipped experiment of that name ({shipped})")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a YAML and ``key=value`` overrides. Raises ConfigError with one line."""
    path = find_config(name)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is no override; write key=value, e.g. prior_training.max_steps=1000")
    try:
        raw = OmegaConf.load(path)
        if not isinstance(raw, DictConfig):
            raise ConfigError(f"{path}: a config is a mapping of sections")
        chosen = OmegaConf.from_dotlist(list(overrides))
        schema = OmegaConf.structured(Config)
        for section, (default, lookup) in KINDS.items():
            if OmegaConf.select(schema, section) is None:  # this kind of the outer section has no such part
                if any(OmegaConf.select(given, section) is not None for given in (raw, chosen)):
                    outer, part = section.rsplit(".", 1)
                    kind = OmegaConf.select(schema, f"{outer}.kind")
                    raise ConfigError(f"{section} is set, but {outer}.kind={kind} has no {part}; leave it out")
                continue
            for where in (raw, chosen):
                if isinstance(value := OmegaConf.select(where, section), str):
                    raise ConfigError(f"{section}={value} is a section; write {section}.kind={value}")
            written = OmegaConf.select(raw, f"{section}.kind", default=default)
            kind = OmegaConf.select(chosen, f"{section}.kind", default=written)
            part = OmegaConf.structured(lookup(kind)[0](kind=kind))
            OmegaConf.update(schema, section, part, merge=False)
            if kind != written and OmegaConf.select(raw, section) is not None:
                # another kind from the command line: the YAML's keys of the old one no longer count
                kept = {key: value for key, value in OmegaConf.select(raw, section).items() if key in part}
                OmegaConf.update(raw, section, kept | {"kind": kind}, merge=False)
        given = OmegaConf.merge({"name": path.stem}, raw, chosen)
        config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0].removesuffix(".")
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{path.name}: {message}" + (f" (key {key})" if key else "")) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        raise
    assert isinstance(config, Config)
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError for a value outside its range or a combination in ``ILLEGAL``."""
    for key, allowed in ALLOWED.items():
        value = get(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value!r}; allowed: {', '.join(map(str, allowed))}")
    for key in POSITIVE:
        if get(config, key) < 1:
            raise ConfigError(f"{key}={get(config, key)}; allowed: 1 or more")
    for key in NETWORK_SIZES:
        if get(config, key) is not None and get(config, key) < 1:
            raise ConfigError(f"{key}={get(config, key)}; allowed: 1 or more")
    for key in SHARES:
        if not 0 <= (get(config, key) or 0) < 1:
            raise ConfigError(f"{key}={get(config, key)}; allowed: 0 to 1, without 1")
    for refuses, message in ILLEGAL:
        if refuses(config):
            raise ConfigError(message(config))


def averages(config: Config) -> bool:
    """Whether moving averages stand between the prior's layers."""
    return get(config, "prior.averaging") not in (None, "none")


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; None for a key that the chosen kind does not have."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


# Combinations of parts that cannot work together: (refuses, one line that says what to change).
ILLEGAL: list[tuple[Callable[[Config], bool], Callable[[Config], str]]] = [
    (
        lambda c: len(c.images.crop_scale) != 2 or not 0 < c.images.crop_scale[0] <= c.images.crop_scale[1] <= 1,
        lambda c: f"images.crop_scale={c.images.crop_scale}; allowed: two shares of the area, 0 < low <= high <= 1",
    ),
    (
        lambda c: c.images.kind in ("folder", "webdataset") and c.images.path is None,
        lambda c: f"images.path is not set; images.kind={c.images.kind} needs images.path=<where your images lie>",
    ),
    (
        lambda c: c.trainer.devices == 0 or c.trainer.devices < -1,
        lambda c: f"trainer.devices={c.trainer.devices}; allowed: 1 or more, or -1 for every GPU",
    ),
    (
        lambda c: c.sampling.guidance != 1 and (c.condition.kind == "none" or c.condition.dropout == 0),
        lambda c: (
            f"sampling.guidance={c.sampling.guidance} with condition.kind={c.condition.kind} and condition.dropout="
            f"{c.condition.dropout}: guidance needs a condition that training drops at times; set sampling.guidance=1"
        ),
    ),
    (
        lambda c: "text" in c.condition.kind and c.tokens.text_encoder == "none",
        lambda c: (
            f"condition.kind={c.condition.kind} with tokens.text_encoder=none: captions need an encoder; set "
            "tokens.text_encoder=minilm or words, or condition.kind=class"
        ),
    ),
    (
        lambda c: (c.tokenizer.kind == "sparse-dct") != (c.prior.kind == "chunked"),
        lambda c: (
            f"tokenizer.kind={c.tokenizer.kind} with prior.kind={c.prior.kind}: lists need a prior that writes lists, "
            f"and no other tokens do; set prior.kind={'chunked' if c.prior.kind != 'chunked' else 'transformer'}"
        ),
    ),
    (
        lambda c: c.images.channels == 3 and get(c, "tokenizer.chroma") == "4:2:0" and get(c, "prior.patch") % 2 == 1,
        lambda c: (
            f"prior.patch={get(c, 'prior.patch')} with tokenizer.chroma=4:2:0: a patch holds whole blocks of chroma; "
            "set it to an even number"
        ),
    ),
    (
        lambda c: c.eval.num_colorized > 0 and get(c, "prior.order") != "luma_first",
        lambda c: (
            f"eval.num_colorized={c.eval.num_colorized} with prior.order={get(c, 'prior.order') or 'natural'}: "
            "colouring needs a prior that writes luma first; set prior.order=luma_first, or eval.num_colorized=0"
        ),
    ),
    (
        lambda c: c.eval.upsample_from > 0 and get(c, "prior.order") not in (None, "natural"),
        lambda c: (
            f"eval.upsample_from={c.eval.upsample_from} with prior.order={get(c, 'prior.order')}: a small image begins "
            "an image in natural order only; set eval.upsample_from=0"
        ),
    ),
    (
        lambda c: bool(c.eval.edit_frozen) and get(c, "prior.order") not in (None, "natural"),
        lambda c: (
            f"eval.edit_frozen={c.eval.edit_frozen} with prior.order={get(c, 'prior.order')}: the scales that stay "
            "begin an image in natural order only; set eval.edit_frozen=[]"
        ),
    ),
    (
        lambda c: c.prior.kind == "transformer" and get(c, "prior.order") not in FIXED_ORDERS,
        lambda c: (
            f"prior.order={get(c, 'prior.order')!r}; allowed with prior.kind=transformer: {', '.join(FIXED_ORDERS)}"
        ),
    ),
    (
        lambda c: c.prior.kind == "chunked" and get(c, "prior.order") not in ORDERS,
        lambda c: f"prior.order={get(c, 'prior.order')!r}; allowed with prior.kind=chunked: {', '.join(ORDERS)}",
    ),
    (
        lambda c: c.tokenizer.kind == "bitplane" and get(c, "prior.order") == "reversed",
        lambda c: (
            "prior.order=reversed with tokenizer.kind=bitplane: a stream has no last element to begin with; set "
            "prior.order=natural"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling > 1 and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"tokenizer_training.oversampling={c.tokenizer_training.oversampling} without a head: nothing learns from "
            "larger images; set tokenizer.head.kind=wavelet, or oversampling=1"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling == 1 and get(c, "tokenizer.head.kind") not in (None, "none"),
        lambda c: (
            f"tokenizer.head.kind={get(c, 'tokenizer.head.kind')} with tokenizer_training.oversampling=1: other sizes "
            "are learned from larger images only; set oversampling to 2 or more"
        ),
    ),
    (
        lambda c: c.tokenizer_training.oversampling > 1 and c.images.train_view in ("pad", "random_crop"),
        lambda c: (
            f"tokenizer_training.oversampling={c.tokenizer_training.oversampling} with images.train_view="
            f"{c.images.train_view}, which never resizes; set images.train_view=center or random_resized_crop"
        ),
    ),
    (
        lambda c: bool(c.eval.head_sizes) and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"eval.head_sizes={c.eval.head_sizes} without a head: set tokenizer.head.kind=wavelet, or "
            "eval.head_sizes=[]"
        ),
    ),
    (
        lambda c: not all(1 <= multiple <= 64 for multiple in c.eval.head_sizes),
        lambda c: f"eval.head_sizes={c.eval.head_sizes}; allowed: multiples of the size from 1 to 64",
    ),
    (
        lambda c: c.tokenizer_training.start_from is not None and get(c, "tokenizer.head.kind") in (None, "none"),
        lambda c: (
            f"tokenizer_training.start_from={c.tokenizer_training.start_from} without a head: nothing is left to "
            "train; set tokenizer.head.kind=wavelet"
        ),
    ),
    (
        lambda c: c.tokenizer_training.start_from is not None and c.tokenizer_training.adversarial_weight > 0,
        lambda c: (
            f"tokenizer_training.start_from with adversarial_weight={c.tokenizer_training.adversarial_weight}: what "
            "the adversary judges is frozen; set tokenizer_training.adversarial_weight=0"
        ),
    ),
    (
        lambda c: not 0 <= (get(c, "prior.early_bias") or 0) < math.inf,
        lambda c: f"prior.early_bias={get(c, 'prior.early_bias')}; allowed: 0 or more",
    ),
    (
        lambda c: get(c, "prior.averaging") not in (None, *AVERAGING),
        lambda c: f"prior.averaging={get(c, 'prior.averaging')!r}; allowed: {', '.join(AVERAGING)}",
    ),
    (
        lambda c: get(c, "prior.averaging_borders") not in (None, *AVERAGING_BORDERS),
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')!r}; allowed: {', '.join(AVERAGING_BORDERS)}"
        ),
    ),
    (
        lambda c: get(c, "prior.averaging") == "learned" and get(c, "prior.averaging_borders") == "grid",
        lambda c: (
            "prior.averaging=learned with prior.averaging_borders=grid: learned windows have one dimension; set "
            "prior.averaging_borders=scale or sample"
        ),
    ),
    (
        lambda c: averages(c) and get(c, "prior.averaging_borders") != "sample" and c.tokenizer.kind == "nested",
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')} with tokenizer.kind=nested: its scales have "
            "one token and no grid; set prior.averaging_borders=sample"
        ),
    ),
    (
        lambda c: averages(c) and get(c, "prior.averaging_borders") != "sample" and c.tokenizer.kind == "bitplane",
        lambda c: (
            f"prior.averaging_borders={get(c, 'prior.averaging_borders')} with tokenizer.kind=bitplane: scales of "
            "streams have no fixed place; set prior.averaging_borders=sample"
        ),
    ),
    (
        lambda c: c.sampling.compile and averages(c),
        lambda c: "sampling.compile=true with prior.averaging: moving averages are not compiled; leave one of them out",
    ),
    (
        lambda c: c.sampling.compile and c.prior.kind == "chunked",
        lambda c: "sampling.compile=true with prior.kind=chunked: it has nothing to compile; leave it out",
    ),
    (
        lambda c: c.eval.num_colorized < 0 or c.eval.num_colorized == 1,
        lambda c: f"eval.num_colorized={c.eval.num_colorized}; allowed: 0, or 2 and more",
    ),
    (
        lambda c: c.eval.timing_repeats < 0,
        lambda c: f"eval.timing_repeats={c.eval.timing_repeats}; allowed: 0 or more",
    ),
]


def to_plain(config: Any) -> dict[str, Any]:
    """Plain dict of a (part of a) config, for YAML, JSON and checkpoints."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
