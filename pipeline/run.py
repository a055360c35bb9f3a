"""The run folder: which stage wrote what, with which config, and who is writing now."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.errors import OctavesError
from data.files import remove_temporaries, write_atomically
from pipeline.config import Config, to_plain
from pipeline.processes import is_first_process

# The sections that decide what a stage produces. `trainer` is missing on purpose: it decides where, not what.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("seed", "images", "tokenizer", "tokenizer_training"),
    "tokens": ("images", "tokenizer", "tokens"),
    "prior": ("seed", "tokens", "condition", "prior", "prior_training"),
}


class RunError(OctavesError):
    """A run folder that cannot be used as asked; the message says what to do."""


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
    return sections


@contextmanager
def stage_folder(folder: Path, config: Config, stage: str) -> Iterator[Path]:
    """Lock ``folder`` for this process and hold it to one config. Raises RunError.

    The lock is flock's: it ends with the process that holds it, so a killed run leaves no stale lock.
    """
    if not is_first_process():
        yield folder  # the first process holds the lock for all ranks that it started
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{folder} is in use by another process; wait for it, or choose another RUN=") from error
        remove_temporaries(folder)
        hold_to_config(folder, stage_config(config, stage), defaults_of(config))
        yield folder


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

    A key that is younger than the folder had its default there, so that an interrupted run goes on with a newer
    version.
    """
    written: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    for section in [name for name in plain if name in defaults and name in written]:
        younger = plain[section].keys() - written[section].keys()
        written[section] |= {key: defaults[section][key] for key in younger}
    return first_difference(written, plain)


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
