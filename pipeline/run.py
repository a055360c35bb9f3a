"""The run folder: locking, and the config that each stage was started with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.errors import InputError
from data.files import locked, remove_temporaries, write_atomically
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.placement import device_of
from pipeline.processes import is_first_process, is_follower
from stages.precision import resolve

# Config sections that determine what a stage produces. `trainer` is not among them: it only says where to run.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("seed", "images", "tokenizer", "tokenizer_training"),
    "tokens": ("images", "tokenizer", "tokens"),
    "prior": ("seed", "tokens", "condition", "prior", "prior_training"),
}
EARLIER_DEFAULTS: dict[str, Any] = {
    "tokenizer_training.optimizer": "adamw",
    "prior_training.optimizer": "adamw",
}
"""Earlier defaults of keys whose default has changed. For a key added later: what versions without it did."""
SECTION_WITH_PRECISION = {"tokenizer": "tokenizer_training", "tokens": "tokens", "prior": "prior_training"}


def stage_config(config: Config, stage: str) -> dict[str, Any]:
    """The plain config of one stage's sections.

    It leaves out paths, because a run folder may be moved, and ``local_gigabytes``, which depends on the machine. It
    also leaves out how to handle unreadable images, so that this can be changed when a run is continued (the manifest
    counts such images).
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
        sections["tokens"].pop("precision")  # the precision of the cache, not of the prior
    return sections


@contextmanager
def stage_folder(folder: Path, config: Config, stage: str) -> Iterator[Config]:
    """Lock ``folder`` for this process, check its config and yield the config to use.

    In that config, precision is ``32`` or ``bf16``, and defaults that have changed since the folder was started have
    their earlier values. The lock ends with its process, so a killed run leaves no stale lock.
    Raises RunError, and InputError for a precision that the device does not support.
    """
    config = as_begun(folder, with_settled_precision(folder, config, stage), stage)
    if not is_first_process():
        yield config  # the first process holds the lock for all ranks
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=False) as acquired:
        if not acquired:
            raise RunError(f"{folder} is in use by another process; wait for it, or choose another RUN=")
        remove_temporaries(folder)
        hold_to_config(folder, stage_config(config, stage), defaults_of(config))
        yield config


def with_settled_precision(folder: Path, config: Config, stage: str) -> Config:
    """Replace precision ``auto`` of a stage by ``32`` or ``bf16``.

    ``auto`` is the recorded precision if the folder already contains output, otherwise the best for this machine.
    Raises InputError for a precision that the device does not support, RunError if the folder was started in it.
    """
    section, device = SECTION_WITH_PRECISION[stage], device_of(config)
    part = getattr(config, section)
    # the first process has already recorded its decision for the ranks that it started
    started = is_made(folder) or is_follower()
    written = written_config(folder).get(section, {}).get("precision") if started else None
    continues = bool(written) and part.precision == "auto"
    try:
        precision = resolve(str(written) if continues else part.precision, device)
    except InputError as error:
        if not continues:
            raise
        raise RunError(
            f"{folder} began in precision {written}, which this {device.type} device does not have; continue with "
            "trainer.accelerator=cpu or on another machine, or choose another RUN="
        ) from error
    return replace(config, **{section: replace(part, precision=precision)})


def as_begun(folder: Path, config: Config, stage: str) -> Config:
    """Set keys that have their default to the earlier default, if the folder was started with the earlier one."""
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
                print(f"{folder} continues with {key}={earlier}, as before; the default is now {default}")
    return config


def written_config(folder: Path) -> dict[str, Any]:
    """Content of ``folder/config.yaml``; empty without that file."""
    path = folder / "config.yaml"
    written: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return dict(written)


def defaults_of(config: Config) -> dict[str, dict[str, Any]]:
    """The default of every key of every section, for the kinds that the config has."""

    def defaults_of_part(part: Any) -> dict[str, Any]:
        inner = {field.name: getattr(part, field.name) for field in fields(part)}
        return asdict(type(part)()) | {
            name: defaults_of_part(value) for name, value in inner.items() if is_dataclass(value)
        }

    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: defaults_of_part(section) for name, section in sections.items() if is_dataclass(section)}


def hold_to_config(folder: Path, plain: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> None:
    """Write ``folder/config.yaml``. Raises RunError, naming the first difference, if the folder has another config.

    A folder without output takes the new config, so that a typo in the first call can be corrected.
    """
    path = folder / "config.yaml"
    if not path.exists() or not is_made(folder):
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(plain)).encode())
    elif difference := difference_from(folder, plain, defaults):
        raise RunError(
            f"{folder} was made with another config ({difference}); choose another RUN=, or delete the folder"
        )


def is_made(folder: Path) -> bool:
    """Whether a stage has already written output to its folder."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "checkpoints/*.ckpt", "*/*.tar"))


def difference_from(folder: Path, plain: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> str | None:
    """The first key in which ``folder/config.yaml`` differs from ``plain``, with both values; None if all are equal.

    A key that did not exist when the folder was started had its (earlier) default, so an interrupted run can continue
    with a newer version. ``precision: auto`` equals every precision, because the folder keeps its own.
    """
    written, current = written_config(folder), dict(plain)
    if "prior" in plain:
        written.get("tokens", {}).pop("precision", None)  # recorded by older versions
    for section in [name for name in plain if name in defaults and name in written]:
        new_keys = plain[section].keys() - written[section].keys()
        written[section] |= {key: EARLIER_DEFAULTS.get(f"{section}.{key}", defaults[section][key]) for key in new_keys}
        if plain[section].get("precision") == "auto":
            current[section] = plain[section] | {"precision": written[section]["precision"]}
    return first_difference(written, current)


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first difference between two plain configs as ``key: old, now new``; None if they are equal."""
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
    """Return ``path`` if it exists. Raises RunError, naming the command that creates it."""
    if not Path(path).exists():
        raise RunError(
            f"{path} is missing: no {what} yet. Run `python -m pipeline {command} <your config> run={config.run}` first"
        )
    return Path(path)
