"""The run folder: which stage wrote what, with which config, and who is writing now."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.errors import InputError
from data.files import remove_temporaries, write_atomically
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.placement import device_of
from pipeline.processes import is_first_process, is_follower
from stages.precision import resolve

# The sections that decide what a stage produces. `trainer` is missing on purpose: it decides where, not what.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("seed", "images", "tokenizer", "tokenizer_training"),
    "tokens": ("images", "tokenizer", "tokens"),
    "prior": ("seed", "tokens", "condition", "prior", "prior_training"),
}
EARLIER_DEFAULTS: dict[str, Any] = {
    "tokenizer_training.optimizer": "adamw",
    "prior_training.optimizer": "adamw",
}
"""What the default of a key was in earlier versions, or what those did that did not have the key yet."""
SECTION_WITH_PRECISION = {"tokenizer": "tokenizer_training", "tokens": "tokens", "prior": "prior_training"}


def stage_config(config: Config, stage: str) -> dict[str, Any]:
    """The plain config of one stage's sections.

    Without the paths, for a run folder may be moved, without what a machine has room for, and without what to do with
    unreadable images: who meets one after a day changes that and goes on (the manifest counts them).
    """
    plain = to_plain(config)
    sections = {section: plain[section] for section in STAGE_SECTIONS[stage]}
    for name in ("tokenizer", "tokens", "prior"):
        sections.get(name, {}).pop("path", None)
    sections.get("tokenizer_training", {}).pop("start_from", None)
    sections.get("tokens", {}).pop("local_gigabytes", None)
    for key in ("skip_corrupt", "max_corrupt_share"):
        sections.get("images", {}).pop(key, None)
    if stage == "prior":
        sections["tokens"].pop("precision")  # the cache has that of its own
    return sections


@contextmanager
def stage_folder(folder: Path, config: Config, stage: str) -> Iterator[Config]:
    """Lock ``folder`` for this process and hold it to one config: the one given, its precision settled, as it began.

    The lock is flock's: it ends with the process that holds it, so a killed run leaves no stale lock. Raises RunError,
    and InputError for a precision that the device does not have.
    """
    config = as_begun(folder, with_settled_precision(folder, config, stage), stage)
    if not is_first_process():
        yield config  # the first process holds the lock for all ranks that it started
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process; wait for it, or choose another RUN=") from error
        remove_temporaries(folder)
        hold_to_config(folder, stage_config(config, stage), defaults_of(config))
        yield config


def with_settled_precision(folder: Path, config: Config, stage: str) -> Config:
    """The config with ``32`` or ``bf16`` as the precision of a stage.

    ``auto`` is what a folder in which something was made has written down, else what suits this machine. Raises
    InputError for a precision that the device does not have, RunError where a folder has begun in it.
    """
    section, device = SECTION_WITH_PRECISION[stage], device_of(config)
    part = getattr(config, section)
    # a rank that the first process started finds the decision there
    begun = is_made(folder) or is_follower()
    written = written_config(folder).get(section, {}).get("precision") if begun else None
    goes_on = bool(written) and part.precision == "auto"
    try:
        precision = resolve(str(written) if goes_on else part.precision, device)
    except InputError as error:
        if not goes_on:
            raise
        raise RunError(
            f"{folder} began in precision {written}, which this {device.type} device does not have; go on with "
            "trainer.accelerator=cpu or on another machine, or choose another RUN="
        ) from error
    return replace(config, **{section: replace(part, precision=precision)})


def as_begun(folder: Path, config: Config, stage: str) -> Config:
    """The config with the earlier default of every key that has its default, where something was made with that."""
    if not is_made(folder):
        return config
    written, defaults = written_config(folder), defaults_of(config)
    for key, earlier in EARLIER_DEFAULTS.items():
        section, name = key.split(".")
        if section not in STAGE_SECTIONS[stage] or written.get(section, {}).get(name, earlier) != earlier:
            continue
        part, default = getattr(config, section), defaults[section][name]
        if getattr(part, name) == default != earlier:
            config = replace(config, **{section: replace(part, **{name: earlier})})
            if is_first_process():
                print(f"{folder} goes on with {key}={earlier}, as it began; the default is {default} now")
    return config


def written_config(folder: Path) -> dict[str, Any]:
    """What ``folder/config.yaml`` holds; empty where there is none."""
    path = folder / "config.yaml"
    written: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return dict(written)


def defaults_of(config: Config) -> dict[str, dict[str, Any]]:
    """The default of every key of every section, for the kinds that the config and its parts have."""

    def of(part: Any) -> dict[str, Any]:
        inner = {field.name: getattr(part, field.name) for field in fields(part)}
        return asdict(type(part)()) | {name: of(value) for name, value in inner.items() if is_dataclass(value)}

    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: of(section) for name, section in sections.items() if is_dataclass(section)}


def hold_to_config(folder: Path, plain: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> None:
    """Write ``folder/config.yaml``, or raise RunError that names the first key in which the written one differs.

    A folder in which nothing was made yet takes the new config: a typo in the first call must not stick.
    """
    path = folder / "config.yaml"
    if not path.exists() or not is_made(folder):
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(plain)).encode())
    elif difference := difference_from(folder, plain, defaults):
        raise RunError(
            f"{folder} was made with another config ({difference}); choose another RUN=, or delete the folder"
        )


def is_made(folder: Path) -> bool:
    """Whether a stage has made something in its folder."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "checkpoints/*.ckpt", "*/*.tar"))


def difference_from(folder: Path, plain: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> str | None:
    """The first key in which ``folder/config.yaml`` is not ``plain``, with both values; None where all agree.

    A key that is younger than the folder had its (earlier) default there, so that an interrupted run goes on with a
    newer version. ``precision: auto`` agrees with every precision: the folder goes on in its own.
    """
    written, wanted = written_config(folder), dict(plain)
    if "prior" in plain:
        written.get("tokens", {}).pop("precision", None)  # older versions wrote it down
    for section in [name for name in plain if name in defaults and name in written]:
        younger = plain[section].keys() - written[section].keys()
        written[section] |= {key: EARLIER_DEFAULTS.get(f"{section}.{key}", defaults[section][key]) for key in younger}
        if plain[section].get("precision") == "auto":
            wanted[section] = plain[section] | {"precision": written[section]["precision"]}
    return first_difference(written, wanted)


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """``key: old, now new`` of the first difference between two plain configs, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            inner = f"{key}.{name}" if key else str(name)
            if name not in old or name not in new:
                return f"{inner}: only in the {'old' if name in old else 'new'} one"
            difference = first_difference(old[name], new[name], inner)
            if difference:
                return difference
        return None
    return None if old == new else f"{key}: {old}, now {new}"


def need(path: str | Path, what: str, command: str, config: Config) -> Path:
    """``path`` if it exists. Raises RunError that names the command which makes it."""
    if not Path(path).exists():
        raise RunError(
            f"{path} is missing: no {what} yet. Run `python -m pipeline {command} <your config> run={config.run}` first"
        )
    return Path(path)
