"""Definition of a study: arms (configs) and seeds, and the run folders in which each cell is trained once.

Notes:

- A cell is one arm with one seed. Its run is named by a hash of what determines its tokens (seed, images, tokenizer and
  its training); its prior and its evaluation are named by their own hashes. Cells with equal hashes share results, also
  between studies. Only values that differ from the defaults are hashed, so a key that a newer version adds changes no
  name.
- All first seeds come before all second seeds, so that an interrupted study has results for every arm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import CONFIG_FOLDER, Config, ConfigError, load_config, read_yaml, to_plain
from pipeline.run import defaults_of, stage_config

FIGURES = [
    "tokenizer.psnr_mean_of_images",
    "tokenizer.psnr_of_mean_error",
    "tokenizer.ssim",
    "tokenizer.perceptual_lite0.mean",
    "tokenizer.fd_lite0.value",
    "rate.fixed_length_bits_per_pixel",
    "rate.entropy_bits_per_pixel",
    "rate.prior_bits_per_pixel",
    "samples.fd_lite0.value",
]
"""Default figures of a study."""

OWN = (
    "seed",
    "name",
    "run",
    "tokenizer.path",
    "tokens.path",
    "prior.path",
    "eval.name",
    "tokenizer_training.start_from",
)
"""Config keys that neither a study nor its command line may set, like all keys of ``trainer``."""


@dataclass
class ArmConfig:
    """An arm, one row of the table."""

    name: str = MISSING
    """Letters, digits, dots and dashes; unique within its study."""
    config: str | None = None
    """A YAML or the name of a shipped experiment; default: that of the study."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys and their values; they override those of the study."""
    seeds: list[int] | None = None
    """Default: those of the study."""
    prior: bool | None = None
    """Whether it has a second stage; default: as in the study."""


@dataclass
class StudyConfig:
    """YAML of a study."""

    question: str = MISSING
    """One sentence, shown above the table."""
    config: str = "photos64"
    """The experiment that the arms modify."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Dotted config keys and their values, for all arms."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of arms without their own."""
    prior: bool = False
    """Whether the arms have a second stage: cached tokens, and a prior that is trained and sampled."""
    figures: list[str] = field(default_factory=lambda: list(FIGURES))
    """Columns: dotted keys of ``metrics.json``; ``*`` stands for every entry of a list."""
    plot: list[str] = field(default_factory=lambda: ["tokenizer.psnr_mean_of_images"])
    """Figures to plot, one panel each."""
    arms: list[ArmConfig] = MISSING


@dataclass(frozen=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    config: Config
    command: tuple[str, ...]
    """Arguments after ``octaves <stage>``."""
    prior: bool

    @property
    def run(self) -> Path:
        """Folder of its tokenizer and tokens."""
        return Path(self.config.run)

    @property
    def metrics(self) -> Path:
        """The file that its evaluation writes."""
        return self.run / "eval" / self.config.eval.name / "metrics.json"

    @property
    def stages(self) -> tuple[tuple[str, Path], ...]:
        """(command, the file that it writes last), in order."""
        first = ("train-tokenizer", Path(self.config.tokenizer.path))
        second = (
            ("cache-tokens", Path(self.config.tokens.path) / "manifest.json"),
            ("train-prior", Path(self.config.prior.path)),
        )
        return (first, *(second if self.prior else ()), ("eval", self.metrics))


def find_study(name: str) -> Path:
    """Find a study by the path of its YAML or by the name of a shipped study. Raises ConfigError, listing these."""
    folder = CONFIG_FOLDER / "studies"
    for candidate in (Path(name), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"study {name}: no such file, and no shipped study of that name ({shipped})")


def load_study(path: Path) -> StudyConfig:
    """Load a study from its YAML. Raises ConfigError for an unknown or missing key, or two arms with the same name."""
    raw = read_yaml(path)
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path}: a study is a mapping of question, config, keys, seeds, figures and arms")
    try:
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), raw))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]} (key {error.full_key})") from error
    assert isinstance(study, StudyConfig)
    check_study(study, path.name)
    return study


def check_study(study: StudyConfig, file: str) -> None:
    """Raise ConfigError for invalid arms, seeds, keys or panels."""
    names = [arm.name for arm in study.arms]
    for name in names:
        if names.count(name) > 1 or not name.replace("-", "").replace(".", "").isalnum():
            raise ConfigError(f"{file}: arm {name!r}; names are letters, digits, dots and dashes, each once")
    if not names:
        raise ConfigError(f"{file}: a study needs an arm")
    for owner, seeds in (("seeds", study.seeds), *((f"seeds of arm {arm.name}", arm.seeds) for arm in study.arms)):
        if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
            raise ConfigError(f"{file}: {owner}={seeds}; allowed: one or more, each once")
    for keys in (study.keys, *(arm.keys for arm in study.arms)):
        check_keys(keys, file)
    if not study.plot or not set(study.plot) <= set(study.figures):
        raise ConfigError(f"{file}: plot={study.plot}; allowed: one or more of figures={study.figures}")


def check_keys(keys: Iterable[str], where: str) -> None:
    """Raise ConfigError for keys that the study sets itself, or that do not distinguish runs."""
    for key in keys:
        if key in OWN or key.split(".")[0] == "trainer":
            raise ConfigError(
                f"{where}: {key} cannot be set in a study, which sets it itself or ignores it; leave it out"
            )


def cells_of(study: StudyConfig, root: Path, extra: Sequence[str] = ()) -> list[Cell]:
    """All cells, first seeds first; ``extra`` are overrides for all. Raises ConfigError for a cell that cannot run."""
    check_keys((item.partition("=")[0] for item in extra), "study")
    seeds = {arm.name: study.seeds if arm.seeds is None else arm.seeds for arm in study.arms}
    rounds = max(len(arm_seeds) for arm_seeds in seeds.values())
    return [
        build_cell(study, arm, seeds[arm.name][turn], root, extra)
        for turn in range(rounds)
        for arm in study.arms
        if turn < len(seeds[arm.name])
    ]


def build_cell(study: StudyConfig, arm: ArmConfig, seed: int, root: Path, extra: Sequence[str]) -> Cell:
    """Build one cell, with its folders under ``root``. Raises ConfigError that names the arm."""
    prior = study.prior if arm.prior is None else arm.prior
    chosen = study.keys | arm.keys
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in chosen.items()}
    keys = [*(f"{key}={value}" for key, value in written.items()), f"seed={seed}", *extra]
    name = arm.config or study.config
    try:
        config = load_config(name, keys)
        defaults = defaults_of(config)
        tokens = [chosen_in(stage_config(config, stage), defaults) for stage in ("tokenizer", "tokens")]
        run = root / f"{config.tokenizer.kind}-{digest(*tokens)}"
        prior_digest = digest(chosen_in(stage_config(config, "prior"), defaults)) if prior else "none"
        places = [f"run={run}", f"prior.path={run}/priors/{prior_digest}/prior.safetensors"]
        eval_sections = {"eval": to_plain(config.eval)} | ({"sampling": to_plain(config.sampling)} if prior else {})
        eval_digest = digest(prior_digest, chosen_in(eval_sections, defaults))
        places += [f"eval.name={eval_digest}", "trainer.progress=false"]
        config = load_config(name, [*keys, *places])
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from error
    return Cell(arm.name, seed, config, (name, *keys, *places), prior)


def chosen_in(plain: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a plain config that differ from their defaults; every kind is kept."""
    changed: dict[str, Any] = {}
    for key, value in plain.items():
        default = defaults.get(key)
        if isinstance(value, dict):
            changed[key] = chosen_in(value, default if isinstance(default, dict) else {})
        elif key == "kind" or key not in defaults or value != default:
            changed[key] = value
    return changed


def digest(*parts: Any) -> str:
    """Hash of plain data with eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
