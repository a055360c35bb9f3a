"""``python -m pipeline <command> CONFIG [key=value …]``, also installed as ``octaves``.

train-tokenizer   learn pixels → tokens → pixels                (stage 1)
cache-tokens      write the tokens of all images to disk
train-prior       learn to write such tokens                    (stage 2)
eval              measure both, write metrics.json and report.html
sample            draw new images: classes=… count=… seed=… out=…
photos            gather colour photos from installed packages: size=64

CONFIG is a YAML or the name of a shipped experiment; every key of it can be overridden by key=value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import OctavesError
from pipeline.config import ConfigError, load_config
from pipeline.processes import end_with_parent

COMMANDS = ("train-tokenizer", "cache-tokens", "train-prior", "eval", "sample", "photos")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, or 2 with one line on stderr for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"octaves: no command {command!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    end_with_parent()
    try:
        run(command, rest)
    except OctavesError as error:
        print(f"octaves: {error}", file=sys.stderr)
        return 2
    return 0


def run(command: str, arguments: list[str]) -> None:
    """Run one command; imports are local, so that a wrong key is answered before torch is loaded twice."""
    if command == "photos":
        from pipeline.photos import run_photos

        run_photos(arguments)
        return
    if not arguments:
        raise ConfigError(f"octaves {command} needs a CONFIG: a YAML, or the name of a shipped experiment")
    name, *overrides = arguments
    if command == "sample":
        from pipeline.sample import SampleRequest, sample_images

        own = {field.name for field in fields(SampleRequest)}
        chosen = [item for item in overrides if item.split("=")[0] in own - {"seed"} or item.startswith("seed=")]
        config = load_config(name, [item for item in overrides if item not in chosen])
        try:
            request = OmegaConf.merge(
                {"run": config.run}, OmegaConf.structured(SampleRequest), OmegaConf.from_dotlist(chosen)
            )
            sample_images(config, SampleRequest(**{key: OmegaConf.select(request, key) for key in own}))
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from error
        return
    config = load_config(name, overrides)
    stage: dict[str, Callable[..., object]] = {}
    if command in ("train-tokenizer", "train-prior"):
        from pipeline.train import train_prior, train_tokenizer

        stage = {"train-tokenizer": train_tokenizer, "train-prior": train_prior}
    elif command == "cache-tokens":
        from pipeline.cache import cache_tokens

        stage = {"cache-tokens": cache_tokens}
    else:
        from pipeline.evaluate import evaluate

        stage = {"eval": evaluate}
    stage[command](config)


if __name__ == "__main__":
    sys.exit(main())
