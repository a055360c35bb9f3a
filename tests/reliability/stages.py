"""The four stages of a toy run, and what each of them makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FOLDERS = {"train-tokenizer": "tokenizer", "cache-tokens": "tokens", "train-prior": "prior", "eval": "eval"}


def arguments(command: str, finished: Path, run: Path) -> list[str]:
    return [command, str(finished / "tiny.yaml"), f"run={run}", "tokens.blocks_per_shard=1"]


def before(command: str, stages: Path, run: Path) -> Path:
    """A run in which the stages before ``command`` are done."""
    for earlier in FOLDERS:
        if earlier == command:
            break
        shutil.copytree(stages / "run" / FOLDERS[earlier], run / FOLDERS[earlier])
    run.mkdir(exist_ok=True)
    return run


def result(run: Path, command: str) -> dict[str, Any]:
    """What a stage has made: its files, and the figures of an evaluation that do not tell the time."""
    folder = run / FOLDERS[command]
    made: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        assert ".tmp" not in path.name, f"{path} was left behind"
        if path.suffix in (".safetensors", ".tar", ".ckpt", ".npz") or path.name in ("manifest.json", "state.json"):
            made[str(path.relative_to(folder))] = path.read_bytes() if path.suffix != ".ckpt" else b""
    if command == "eval":
        metrics = json.loads((folder / "default/metrics.json").read_bytes())
        made["figures"] = {name: without_times(metrics[name]) for name in ("tokenizer", "samples", "rate", "codes")}
        assert (folder / "default/report.html").exists()
    return made


def without_times(figures: Any) -> Any:
    if isinstance(figures, dict):
        return {key: without_times(value) for key, value in figures.items() if "second" not in key}
    return figures
