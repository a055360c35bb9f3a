"""One experiment: dataclass defaults, then a YAML, then ``key=value`` from the command line.

Each component's dataclass stands next to its owner. ``kind`` keys pick a dataclass before the YAML is merged, so an
unknown key, a wrong type or an impossible combination ends here, with one line, before any work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import OctavesError
from data.images.config import ImagesConfig
from data.tokens.config import TokensConfig
from pipeline.errors import RunError
from pipeline.rules import broken_rule, broken_rule_for
from stages.conditions.config import ConditionConfig
from stages.factory import condition_config, head_config, prior_config, quantizer_config, tokenizer_config
from stages.measures.config import EvalConfig
from stages.prior.config import PriorConfig, PriorTrainingConfig, SamplingConfig
from stages.tokenizer.config import TokenizerConfig, TokenizerTrainingConfig

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(OctavesError, ValueError):
    """A config that cannot run; the message is one line for the person who wrote it."""


@dataclass
class TrainerConfig:
    """Where the work runs. Nothing here changes a result on purpose, so it may differ between two calls of one run."""

    accelerator: str = "auto"
    """auto, cpu, gpu or mps. auto takes a CUDA GPU where there is one, else Apple's (mps), else the CPU."""
    devices: int = 1
    """Processes on this machine; -1: every GPU. They share its cores; Apple's GPU is one device."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "ddp"
    """What several processes of train-prior keep: ddp, each the whole training state; fsdp, each its share of it."""
    num_workers: int | str = "auto"
    """Loader processes for each training process; 0 loads in the training process itself. auto is 0 for tokens and for
    images that lie in memory (demo, fashion), else it follows from the cores that may be used: 8 at most."""
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
KINDS: dict[str, tuple[str, Callable[[str], type[Any]]]] = {
    "tokenizer": ("sit", tokenizer_config),
    "tokenizer.quantizer": ("fsq", quantizer_config),
    "tokenizer.head": ("none", head_config),
    "condition": ("class", condition_config),
    "prior": ("transformer", prior_config),
}


def find_config(name: str | Path) -> Path:
    """The YAML of a path, or of a shipped experiment's name. Raises ConfigError that lists the shipped ones."""
    for candidate in (Path(name), CONFIG_FOLDER / f"{name}.yaml", CONFIG_FOLDER / str(name)):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise ConfigError(f"CONFIG={name}: no such file, and no shipped experiment of that name ({shipped})")


def read_yaml(path: Path) -> Any:
    """What a YAML holds. Raises ConfigError for a file that is no text, or that holds a single value."""
    try:
        return OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})") from error
    except OSError as error:
        if error.errno is None:  # OmegaConf's own
            raise ConfigError(f"{path}: a config is a mapping of sections") from error
        raise


@cache
def schema_of(kinds: tuple[tuple[str, str, type[Any]], ...]) -> DictConfig:
    """The keys of a config in which these (section, kind, dataclass) are chosen, in the order of ``KINDS``.

    One for all callers, who copy it by merging: to build it takes longer than to read a config by it.
    """
    if not kinds:
        return OmegaConf.structured(Config)
    schema = deepcopy(schema_of(kinds[:-1]))
    section, kind, part = kinds[-1]
    OmegaConf.update(schema, section, OmegaConf.structured(part(kind=kind)), merge=False)
    return schema


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a YAML and ``key=value`` overrides. Raises ConfigError with one line."""
    path = find_config(name)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is no override; write key=value, e.g. prior_training.max_steps=1000")
    try:
        raw = read_yaml(path)
        if not isinstance(raw, DictConfig):
            raise ConfigError(f"{path}: a config is a mapping of sections")
        chosen = OmegaConf.from_dotlist(list(overrides))
        kinds: tuple[tuple[str, str, type[Any]], ...] = ()
        schema = schema_of(kinds)
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
            kinds = (*kinds, (section, kind, lookup(kind)))
            schema = schema_of(kinds)
            part = OmegaConf.select(schema, section)
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
    if broken := broken_rule(config):
        raise ConfigError(broken)
    return config


def load_run(name: str, overrides: Sequence[str]) -> Config:
    """The config of a YAML, a shipped experiment, or the folder of a finished run.

    A folder knows what its stages were made with, but not how its YAML sampled: that is at its defaults then.
    Raises ConfigError, or RunError for a folder that is no run.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return load_config(name, overrides)
    parts = [folder / stage / "config.yaml" for stage in ("tokenizer", "prior")]
    if not all(part.is_file() for part in parts):
        raise RunError(f"{folder} is no finished run: {parts[0]} or {parts[1]} is missing; give its YAML, or train it")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{folder.resolve().name}.yaml"
        OmegaConf.save(OmegaConf.merge(*(OmegaConf.load(part) for part in parts)), path)
        return load_config(path, [f"run={folder}", *overrides])


def check_command(command: str, config: Config) -> None:
    """Raise ConfigError for what other commands can do, but not this one."""
    if broken := broken_rule_for(command, config):
        raise ConfigError(broken)


def to_plain(config: Any) -> dict[str, Any]:
    """Plain dict of a (part of a) config, for YAML, JSON and checkpoints."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
