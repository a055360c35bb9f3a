"""The config of an experiment: dataclass defaults, then a YAML, then ``key=value`` from the command line.

The dataclass of each part is defined next to the part. ``kind`` keys select dataclasses before the YAML is merged, so
unknown keys, wrong types and invalid combinations are reported in one line before any work starts.
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
    """An invalid config. The message is one line for the user."""


@dataclass
class TrainerConfig:
    """Where to run. These keys are not meant to change results, so they may differ between two calls of one run."""

    accelerator: str = "auto"
    """auto, cpu, gpu or mps. auto is a CUDA GPU if available, otherwise an Apple GPU (mps), otherwise the CPU."""
    devices: int = 1
    """Processes on this machine, which share its cores; -1: one per GPU. An Apple GPU is one device."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: str = "ddp"
    """ddp: each process of train-prior keeps the whole training state; fsdp: each process keeps a part of it."""
    num_workers: int | str = "auto"
    """Loader processes per training process; 0 loads in the training process itself. auto is 0 for tokens and for
    images in memory (demo, fashion), otherwise it depends on the usable cores and is at most 8."""
    progress: bool = True
    """Show progress bars."""


@dataclass
class Config:
    """A whole experiment."""

    name: str = "experiment"
    """Name of the run; default: the file name of the YAML."""
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


# Keys whose value selects the dataclass of their section. Outer sections come first.
KINDS: dict[str, tuple[str, Callable[[str], type[Any]]]] = {
    "tokenizer": ("sit", tokenizer_config),
    "tokenizer.quantizer": ("fsq", quantizer_config),
    "tokenizer.head": ("none", head_config),
    "condition": ("class", condition_config),
    "prior": ("transformer", prior_config),
}


def find_config(name: str | Path) -> Path:
    """Find a YAML by its path or by the name of a shipped experiment. Raises ConfigError, which lists these names."""
    for candidate in (Path(name), CONFIG_FOLDER / f"{name}.yaml", CONFIG_FOLDER / str(name)):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise ConfigError(f"CONFIG={name}: no such file, and no shipped experiment of that name ({shipped})")


def read_yaml(path: Path) -> Any:
    """Read a YAML. Raises ConfigError if the file is not text or contains only a single value."""
    try:
        return OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error})") from error
    except OSError as error:
        if error.errno is None:  # raised by OmegaConf
            raise ConfigError(f"{path}: a config is a mapping of sections") from error
        raise


@cache
def schema_of(kinds: tuple[tuple[str, str, type[Any]], ...]) -> DictConfig:
    """Schema of a config for the chosen kinds, given as (section, kind, dataclass) in the order of ``KINDS``.

    It is cached because building it takes longer than reading a config. Callers do not change it: merging copies it.
    """
    if not kinds:
        return OmegaConf.structured(Config)
    schema = deepcopy(schema_of(kinds[:-1]))
    section, kind, part = kinds[-1]
    OmegaConf.update(schema, section, OmegaConf.structured(part(kind=kind)), merge=False)
    return schema


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML with ``key=value`` overrides and resolve it. Raises ConfigError with one line."""
    path = find_config(name)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is not an override; write key=value, e.g. prior_training.max_steps=1000")
    try:
        raw = read_yaml(path)
        if not isinstance(raw, DictConfig):
            raise ConfigError(f"{path}: a config is a mapping of sections")
        chosen = OmegaConf.from_dotlist(list(overrides))
        kinds: tuple[tuple[str, str, type[Any]], ...] = ()
        schema = schema_of(kinds)
        for section, (default, lookup) in KINDS.items():
            if OmegaConf.select(schema, section) is None:  # the chosen kind of the outer section has no such part
                if any(OmegaConf.select(given, section) is not None for given in (raw, chosen)):
                    outer, part = section.rsplit(".", 1)
                    kind = OmegaConf.select(schema, f"{outer}.kind")
                    raise ConfigError(f"{section} is set, but {outer}.kind={kind} has no {part}; leave it out")
                continue
            for source in (raw, chosen):
                if isinstance(value := OmegaConf.select(source, section), str):
                    raise ConfigError(f"{section}={value} is a section; write {section}.kind={value}")
            written = OmegaConf.select(raw, f"{section}.kind", default=default)
            kind = OmegaConf.select(chosen, f"{section}.kind", default=written)
            kinds = (*kinds, (section, kind, lookup(kind)))
            schema = schema_of(kinds)
            part = OmegaConf.select(schema, section)
            if kind != written and OmegaConf.select(raw, section) is not None:
                # the command line chooses another kind: drop keys in the YAML that this kind does not have
                shared_keys = {key: value for key, value in OmegaConf.select(raw, section).items() if key in part}
                OmegaConf.update(raw, section, shared_keys | {"kind": kind}, merge=False)
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
    """Load the config of a YAML, of a shipped experiment, or of the folder of a finished run.

    A run folder contains the config of its stages, but not the sampling settings of its YAML; these get their defaults.
    Raises ConfigError, and RunError for a folder that is not a finished run.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return load_config(name, overrides)
    parts = [folder / stage / "config.yaml" for stage in ("tokenizer", "prior")]
    if not all(part.is_file() for part in parts):
        raise RunError(
            f"{folder} is not a finished run: {parts[0]} or {parts[1]} is missing; give its YAML, or train it"
        )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{folder.resolve().name}.yaml"
        OmegaConf.save(OmegaConf.merge(*(OmegaConf.load(part) for part in parts)), path)
        return load_config(path, [f"run={folder}", *overrides])


def check_command(command: str, config: Config) -> None:
    """Raise ConfigError for settings that this command does not support, but others do."""
    if broken := broken_rule_for(command, config):
        raise ConfigError(broken)


def to_plain(config: Any) -> dict[str, Any]:
    """Convert a config or a part of it to a plain dict, for YAML, JSON and checkpoints."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
