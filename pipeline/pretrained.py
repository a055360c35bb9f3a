"""What can be loaded and used: a tokenizer's file, a run's folder, or a folder that ``octaves export`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.errors import OctavesError
from data.files import file_sha256
from data.images.config import ImagesConfig
from stages.contract import Prior, Tokenizer
from stages.prior.sampling import SamplingConfig
from stages.weights import check_pair, load_prior, load_tokenizer

FORMAT = "octaves-export/1"
CONFIG = "config.json"
CARD = "README.md"
TOKENIZER = "tokenizer.safetensors"
PRIOR = "prior.safetensors"
PROGRAMS = {"encoder": "encoder.pt2", "decoder": "decoder.pt2"}


class PretrainedError(OctavesError, ValueError):
    """A path that holds no model of this project, or a damaged one."""


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer, the prior over its tokens, and how both want to be used."""

    tokenizer: Tokenizer
    prior: Prior | None = None
    """None where there is a tokenizer alone."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How images are cut: size, channels, eval_view and background."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn where nobody says otherwise."""


def load_pretrained(path: str | Path) -> Pretrained:
    """The models of a tokenizer's file, a run's folder or an export, on the CPU.

    A run's folder knows what it was trained with, but not how its YAML samples; an export knows both. Raises
    PretrainedError for a path that is none of these, or an export whose files are not those that it names, and
    WeightsError for damaged weights or a prior of another tokenizer.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return _load(given, None, {}, SamplingConfig())
    if (given / CONFIG).is_file():
        config = read_export(given)
        check_files(given, config, [TOKENIZER, *([PRIOR] if config["prior"] else [])])
        try:
            sampling = SamplingConfig(**config["sampling"])
            return _load(given / TOKENIZER, given / PRIOR if config["prior"] else None, config["images"], sampling)
        except (KeyError, TypeError) as error:
            raise PretrainedError(f"{given / CONFIG} does not describe an export ({error})") from error
    stage = given / "tokenizer"
    if (stage / TOKENIZER).is_file():
        prior = given / "prior" / PRIOR
        images = read_stage_config(stage / TOKENIZER).get("images", {})
        return _load(stage / TOKENIZER, prior if prior.is_file() else None, images, SamplingConfig())
    if not given.exists():
        raise PretrainedError(f"{given}: no such file or folder")
    raise PretrainedError(
        f"{given} is neither an export (it has no {CONFIG}) nor a run (it has no tokenizer/{TOKENIZER}); give one of "
        f"these, or a {TOKENIZER}"
    )


def read_export(folder: Path) -> dict[str, Any]:
    """``config.json`` of an export. Raises PretrainedError for anything else."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path}: missing or no JSON ({error})") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise PretrainedError(f"{path} was not written by `octaves export`: format {found!r}, expected {FORMAT!r}")
    if not isinstance(config.get("files"), dict) or "prior" not in config:
        raise PretrainedError(f"{path} does not describe an export (it names no files)")
    return config


def check_files(folder: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Raise PretrainedError unless an export has these files with the sha256 that its ``config.json`` names."""
    for name in names:
        path = folder / name
        if not path.is_file():
            raise PretrainedError(f"{path} is missing; export or download the folder again")
        found, wanted = file_sha256(path), str(config["files"].get(name))
        if found != wanted:
            raise PretrainedError(
                f"{path} is not the file that {CONFIG} names: sha256 {found[:12]}, not {wanted[:12]}; export or "
                "download it again (in a git clone: git lfs pull)"
            )


def read_stage_config(weights: Path) -> dict[str, Any]:
    """The plain config that a run keeps beside a weights file; empty where there is none."""
    path = weights.parent / "config.yaml"
    if not path.is_file():
        return {}
    plain = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _load(
    tokenizer_path: Path, prior_path: Path | None, images: dict[str, Any], sampling: SamplingConfig
) -> Pretrained:
    """What the files hold; of the config section ``images`` it takes how they are cut."""
    tokenizer, _ = load_tokenizer(tokenizer_path)
    prior = None
    if prior_path is not None:
        prior, metadata = load_prior(prior_path)
        check_pair(metadata, prior_path, tokenizer_path)
    cut = {key: images[key] for key in ("eval_view", "background") if key in images}
    own = ImagesConfig(size=tokenizer.layout.image_size[0], channels=tokenizer.channels, **cut)
    return Pretrained(tokenizer, prior, own, sampling)
