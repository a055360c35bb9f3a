"""export: write a finished run to a folder with the layout of a Hugging Face model repository.

The folder contains ``tokenizer.safetensors``, ``prior.safetensors`` (if there is a prior), ``config.json``,
``README.md`` (the model card) and, on request, ``encoder.pt2`` and ``decoder.pt2``, which need only torch. Notes:

- The folder is complete or missing: it is written under a temporary name, loaded as a check, and renamed.
- Paths of local image folders are left out; the path of a text encoder is kept, because captions need it.
- The card only contains metrics of an evaluation of exactly these weights.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from data.files import file_sha256, publish, write_atomically
from data.tokens.manifest import Manifest, has_manifest
from pipeline.config import Config, to_plain
from pipeline.errors import RunError
from pipeline.model_card import Facts, write_card
from pipeline.models import join
from pipeline.own_keys import ExportRequest
from pipeline.pretrained import (
    CARD,
    CONFIG,
    FORMAT,
    PRIOR,
    PROGRAMS,
    TOKENIZER,
    PretrainedError,
    check_files,
    load_pretrained,
    read_export,
    read_stage_config,
)
from pipeline.run import need
from stages.contract import Tokenizer
from stages.programs import check_programs, export_programs
from stages.weights import check_pair, load_prior, load_tokenizer, tokens_sha256


def export_run(config: Config, request: ExportRequest) -> Path:
    """Write the folder and load it as a check. Returns the folder.

    Raises RunError for a missing tokenizer, an ``out`` that is not free or an invalid license name; WeightsError for
    damaged weights or parts that do not belong together; InputError for programs of a codec.
    """
    out = Path(request.out).expanduser().resolve()
    check_free(out)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", request.license):
        raise RunError(f"license={request.license}; allowed: a name such as mit, apache-2.0, cc-by-4.0 or other")
    tokenizer_path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    tokenizer, metadata = load_tokenizer(tokenizer_path)
    sources = {TOKENIZER: tokenizer_path}
    prior_metadata: dict[str, Any] | None = None
    if Path(config.prior.path).exists():
        sources[PRIOR] = Path(config.prior.path)
        prior, prior_metadata = load_prior(sources[PRIOR])
        check_pair(prior_metadata, sources[PRIOR], tokenizer_path)
        join(tokenizer, prior, torch.device("cpu"), 1, "32").check(config.sampling)
    else:
        print(f"no prior at {config.prior.path}: the tokenizer is exported alone")
    programs: dict[str, ExportedProgram] = {}
    if request.programs:
        programs = export_programs(tokenizer)
        check_programs(programs, tokenizer)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"out={out} cannot be written ({error.strerror}); choose another out=") from error
    try:
        for name, source in sources.items():
            shutil.copyfile(source, temporary / name)
        for name, program in programs.items():
            torch.export.save(program, temporary / PROGRAMS[name])
        for path in temporary.iterdir():
            sync(path)
        hashes = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        described = describe(config, tokenizer, metadata, prior_metadata, sources, hashes)
        content = json.dumps(described, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(temporary / CONFIG, content.encode())
        hashes[CONFIG] = file_sha256(temporary / CONFIG)
        metrics, why_not = find_metrics(config, hashes)
        if why_not:
            print(f"the model card has no metrics: {why_not}")
        counts = find_counts(config, tokenizer_path)
        facts = Facts(described, hashes, request.license, read_images_config(config, sources), counts, metrics, why_not)
        write_atomically(temporary / CARD, write_card(facts).encode())
        verify(temporary, described, programs)
        put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}: {', '.join(sorted([*hashes, CARD]))}")
    return out


def check_free(out: Path) -> None:
    """Raise RunError if ``out`` contains anything that this command did not write."""
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir():
        raise RunError(f"out={out}: {parent} is a file; choose another out=")
    if not out.exists():
        return
    if not out.is_dir():
        raise RunError(f"out={out} is a file; choose another out=")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    try:
        read_export(out)
    except PretrainedError as error:
        raise RunError(f"out={out} contains something other than an export; choose another out=") from error
    if others := sorted(names - {TOKENIZER, PRIOR, CONFIG, CARD, *PROGRAMS.values()}):
        raise RunError(
            f"out={out} also contains {others[0]}, which is not part of an export; choose another out=, or move it away"
        )


def describe(
    config: Config,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    about_prior: dict[str, Any] | None,
    sources: dict[str, Path],
    hashes: dict[str, str],
) -> dict[str, Any]:
    """Content of ``config.json``: what loaders and readers need in addition to the metadata of the weights."""
    stages = {name: without_paths(read_stage_config(path)) for name, path in sources.items()}
    images = read_images_config(config, sources)
    keys = ("kind", "config", "layout", "image_size", "channels", "pixel_range", "steps")
    described: dict[str, Any] = {
        "format": FORMAT,
        "name": config.name,
        "files": hashes,
        "images": {key: images[key] for key in ("kind", "size", "channels", "eval_view", "background")},
        "tokenizer": {"class": type(tokenizer).__name__, **{key: about[key] for key in keys if key in about}},
        "prior": None,
        "sampling": {**to_plain(config.sampling), "compile": False},
        "training": {name.removesuffix(".safetensors"): stage for name, stage in stages.items()},
    }
    if about_prior is not None:
        keys = ("kind", "config", "condition", "class_names", "text", "tokenizer_sha256", "steps")
        described["prior"] = {key: about_prior[key] for key in keys if key in about_prior}
    if PROGRAMS["encoder"] in hashes:
        pixels = f"float32 [B, {tokenizer.channels}, {', '.join(map(str, tokenizer.layout.image_size))}] in [-1, 1]"
        ids = f"int64 [B, {tokenizer.layout.length}, {tokenizer.layout.num_fields}]"
        described["programs"] = {
            PROGRAMS["encoder"]: {"input": pixels, "output": ids},
            PROGRAMS["decoder"]: {"input": ids, "output": pixels},
        }
    return described


def read_images_config(config: Config, sources: dict[str, Path]) -> dict[str, Any]:
    """Config of the images that the tokenizer was trained on: as recorded in the run, otherwise from ``config``."""
    return asdict(config.images) | read_stage_config(sources[TOKENIZER]).get("images", {})


def without_paths(stage: dict[str, Any]) -> dict[str, Any]:
    """Config of a stage without the paths of local image folders."""
    private = ("path", "val_path")
    return {
        section: {key: item for key, item in value.items() if key not in private} if section == "images" else value
        for section, value in stage.items()
    }


def find_metrics(config: Config, hashes: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(metrics of the evaluation ``eval.name``, "") if they belong to these files, otherwise (None, the reason)."""
    path = Path(config.run) / "eval" / config.eval.name / "metrics.json"
    if not path.is_file():
        return None, f"this run has no evaluation {config.eval.name!r}; run `octaves eval`"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        settings = metrics["settings"]
        evaluated = [None if settings[part] is None else settings[part]["sha256"] for part in ("tokenizer", "prior")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged or not an evaluation ({error}); run `octaves eval` again") from error
    if evaluated != [hashes[TOKENIZER], hashes.get(PRIOR)]:
        return None, f"the evaluation {config.eval.name!r} is of other weights; run `octaves eval` again"
    return metrics, ""


def find_counts(config: Config, tokenizer_path: Path) -> dict[str, int]:
    """Number of images per split, without mirrored ones; empty without a token cache of this tokenizer."""
    if not has_manifest(config.tokens.path):
        return {}
    manifest = Manifest.load(config.tokens.path)
    if manifest.tokenizer_sha256 != tokens_sha256(tokenizer_path):
        return {}
    return {name: split.count for name, split in manifest.splits.items()}


def verify(folder: Path, described: dict[str, Any], programs: dict[str, ExportedProgram]) -> None:
    """Load the result as a check: hashes, models and programs. Raises OctavesError if something is wrong."""
    check_files(folder, described, described["files"])
    loaded = load_pretrained(folder)
    if programs:
        check_programs({name: torch.export.load(folder / PROGRAMS[name]) for name in programs}, loaded.tokenizer)


def sync(path: Path) -> None:
    """Wait until a file is written to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename the finished folder. An earlier export is moved aside first and restored if renaming fails."""
    aside = out.with_name(f".{out.name}.old-{os.getpid()}")
    replaces = out.exists()
    if replaces:
        out.rename(aside)
    try:
        publish(temporary, out)
    except OSError:
        if replaces:
            aside.rename(out)
        raise
    if replaces:
        shutil.rmtree(aside)
