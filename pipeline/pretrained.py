"""Load models from a tokenizer file, a run folder, or a folder written by ``octaves export``."""

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
    """A path without a model of this project, or with a damaged one."""


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer, the prior of its tokens, and default settings."""

    tokenizer: Tokenizer
    prior: Prior | None = None
    """None for a tokenizer alone."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """How images are cropped: size, channels, eval_view and background."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Default sampling settings."""


def load_pretrained(path: str | Path) -> Pretrained:
    """Load the models of a tokenizer file, a run folder or an export, on the CPU.

    An export contains the sampling settings of its config; a run folder does not, so they have their defaults. Raises
    PretrainedError for a path that is none of these, or an export whose files differ from those listed in its
    ``config.json``; WeightsError for damaged weights or a prior of another tokenizer.
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
    """Read ``config.json`` of an export. Raises PretrainedError for anything else."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path}: missing or not valid JSON ({error})") from error
    file_format = config.get("format") if isinstance(config, dict) else None
    if file_format != FORMAT:
        raise PretrainedError(
            f"{path} was not written by `octaves export`: format {file_format!r}, expected {FORMAT!r}"
        )
    if not isinstance(config.get("files"), dict) or "prior" not in config:
        raise PretrainedError(f"{path} does not describe an export (it lists no files)")
    return config


def check_files(folder: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Raise PretrainedError unless an export contains these files with the sha256 listed in its ``config.json``."""
    for name in names:
        path = folder / name
        if not path.is_file():
            raise PretrainedError(f"{path} is missing; export or download the folder again")
        actual, expected = file_sha256(path), str(config["files"].get(name))
        if actual != expected:
            raise PretrainedError(
                f"{path} is not the file listed in {CONFIG}: sha256 {actual[:12]}, not {expected[:12]}; export or "
                "download it again (in a git clone: git lfs pull)"
            )


def read_stage_config(weights: Path) -> dict[str, Any]:
    """The plain config that a run stores beside a weights file; empty if there is none."""
    path = weights.parent / "config.yaml"
    if not path.is_file():
        return {}
    plain = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def _load(
    tokenizer_path: Path, prior_path: Path | None, images: dict[str, Any], sampling: SamplingConfig
) -> Pretrained:
    """Load the files. Of the config section ``images``, only the keys on cropping are used."""
    tokenizer, _ = load_tokenizer(tokenizer_path)
    prior = None
    if prior_path is not None:
        prior, metadata = load_prior(prior_path)
        check_pair(metadata, prior_path, tokenizer_path)
    crop_keys = {key: images[key] for key in ("eval_view", "background") if key in images}
    image_config = ImagesConfig(size=tokenizer.layout.image_size[0], channels=tokenizer.channels, **crop_keys)
    return Pretrained(tokenizer, prior, image_config, sampling)
