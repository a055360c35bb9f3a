"""``python -m pipeline <command> CONFIG [key=value …]``, also installed as ``octaves``.

train-tokenizer   stage 1: train the tokenizer (pixels → tokens → pixels)
cache-tokens      encode all images and write the tokens to disk
train-prior       stage 2: train the prior, a model of these tokens
eval              evaluate both stages, write metrics.json and report.html
sample            generate images: classes=… text=… count=… seed=… out=…
reconstruct       encode and decode images: input=… size=300x517 crop=top,left,height,width
upsample          enlarge small images: input=… to=… and the keys of sample
colorize          colorize gray images: input=… and the keys of sample (needs prior.order=luma_first)
edit              keep coarse scales, sample fine ones again: input=… frozen=… mask=… guidances=… and the keys of sample
export            write tokenizer, prior and model card to one folder: out=… programs=true license=…
studio            web page to sample, upsample and edit: CONFIG may be a run folder; host=… port=…
rates             compare bit rate and PSNR of evaluations and image formats: runs=folder,folder out=…
orders            compare how well tokens are predicted from earlier ones, by order: runs=folder,folder out=…
sweep             evaluate a grid of sampling settings: guidances=1,2 temperatures=0.9,1 top_ks=0,100 out=…
compare           compare evaluations in one table, no CONFIG: runs=folder,folder out=…
bench             measure the speed of every part: parts=… repeats=… memory=64,128 (of a prior over lists) out=…
plan              estimate training time on many GPUs: gpus=8 teraflops=989 utilisation=0.4 out=…
text-tokens       write the bytes of a text as a token cache: file=… length=… (then train-prior condition.kind=none)
photos            collect color photos from installed packages: size=64
study             train a grid of configs and seeds, write one table: octaves study NAME jobs=… minutes=…
fit-inr           fit coordinate networks to images, no CONFIG: image.png [image.png …] variants=… steps=… out=…

CONFIG is a YAML or the name of a shipped experiment; key=value overrides any of its keys.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any, get_type_hints

from data.errors import OctavesError
from pipeline import own_keys
from pipeline.config import ConfigError, load_config, load_run
from pipeline.cores import use_threads
from pipeline.processes import REQUEUE, Preempted, end_with_parent, ending_on_sigterm

# command: (module, function, dataclass in own_keys.py or None)
COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "train-tokenizer": ("pipeline.train", "train_tokenizer", None),
    "cache-tokens": ("pipeline.cache", "cache_tokens", None),
    "train-prior": ("pipeline.train", "train_prior", None),
    "eval": ("pipeline.evaluate", "evaluate", None),
    "sample": ("pipeline.sample", "sample_images", "SampleRequest"),
    "reconstruct": ("pipeline.reconstruct", "reconstruct_images", "ReconstructRequest"),
    "upsample": ("pipeline.upsample", "upsample_images", "UpsampleRequest"),
    "colorize": ("pipeline.colorize", "colorize_images", "ColorizeRequest"),
    "edit": ("pipeline.edit", "edit_images", "EditRequest"),
    "export": ("pipeline.export", "export_run", "ExportRequest"),
    "studio": ("pipeline.studio", "run_studio", "StudioRequest"),
    "rates": ("pipeline.rates", "compare_rates", "RatesRequest"),
    "orders": ("pipeline.orders", "compare_orders", "OrdersRequest"),
    "sweep": ("pipeline.sweep", "sweep", "SweepRequest"),
    "compare": ("pipeline.compare", "compare_runs", None),
    "bench": ("pipeline.bench.command", "run_bench", "BenchRequest"),
    "plan": ("pipeline.plan", "run_plan", "PlanRequest"),
    "text-tokens": ("pipeline.text_tokens", "cache_text", "TextTokensRequest"),
    "photos": ("pipeline.photos", "run_photos", None),
    "fit-inr": ("pipeline.fit_inr", "run_fit", None),
    "study": ("pipeline.studies.command", "run_study", None),
}
WITHOUT_CONFIG = ("photos", "fit-inr", "compare", "study")
AGAIN = "then run the same command again to continue"
# OSErrors that the user can fix; all others are bugs.
ENVIRONMENT_ERRORS = {
    errno.ENOSPC: f"free some, {AGAIN}",
    errno.EDQUOT: f"free some, {AGAIN}",
    errno.EROFS: "choose a writable run= or out=",
    errno.EACCES: "choose a folder that you can access",
    errno.EPERM: "choose a folder that you can access",
    errno.EIO: f"the disk fails; move the folder, {AGAIN}",
    errno.ENAMETOOLONG: "choose a shorter run=, path or key",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0; 2 for errors that the user can fix; REQUEUE after SIGTERM.

    Errors are printed to stderr in one line.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"octaves: no command {command!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    end_with_parent()
    use_threads()
    try:
        with ending_on_sigterm():
            run(command, rest)
    except Preempted as preempted:
        print(f"octaves: {preempted}", file=sys.stderr)
        return REQUEUE
    except OctavesError as error:
        print(f"octaves: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"octaves: {place}{error.strerror}; {ENVIRONMENT_ERRORS[error.errno]}", file=sys.stderr)
        return 2
    return 0


def run(command: str, arguments: list[str]) -> None:
    """Run one command. Its module is imported only now, so that a wrong key is reported before anything is loaded."""
    module, function, keys_name = COMMANDS[command]
    if command in WITHOUT_CONFIG:
        getattr(import_module(module), function)(arguments)
        return
    if not arguments:
        raise ConfigError(f"octaves {command} needs a CONFIG: a YAML, or the name of a shipped experiment")
    name, *overrides = arguments
    if keys_name is None:
        config = load_config(name, overrides)
        getattr(import_module(module), function)(config)
        return
    request_class = getattr(own_keys, keys_name)
    own = {field.name for field in fields(request_class)}
    chosen = [item for item in overrides if item.split("=")[0] in own]
    load = load_run if command == "studio" else load_config
    config = load(name, [item for item in overrides if item not in chosen])
    request = read_request(request_class, config.run, chosen)
    getattr(import_module(module), function)(config, request)


def read_request(request_class: type[Any], run_folder: str, chosen: list[str]) -> Any:
    """Parse a command's own keys; ``${run}`` in a default is the run folder. Raises ConfigError for an invalid value.

    Values are taken literally: a caption such as ``no``, ``1, 2`` or ``${x}`` is neither YAML nor a reference.
    """
    kinds = get_type_hints(request_class)
    values: dict[str, Any] = {
        field.name: field.default.replace("${run}", run_folder)
        for field in fields(request_class)
        if isinstance(field.default, str)
    }
    for item in chosen:
        key, _, value = item.partition("=")
        if kinds[key] is bool:
            if value not in ("true", "false"):
                raise ConfigError(f"{key}={value}; allowed: true or false")
            values[key] = value == "true"
            continue
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise ConfigError(f"{key}={value}; allowed: a {'whole ' * (kinds[key] is int)}number") from error
    return request_class(**values)


if __name__ == "__main__":
    sys.exit(main())
