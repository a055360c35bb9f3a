"""study: train every cell of a study that is not there yet, and write one table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.errors import RunError
from pipeline.studies.plan import cells_of, find_study, load_study
from pipeline.studies.table import write_tables
from pipeline.studies.train import outdated, train


@dataclass
class StudyRequest:
    """The command's own keys; every other ``key=value`` overrides the configs of all arms."""

    out: str = "runs/studies"
    """Folder of all studies: runs in ``runs``, which studies share, tables in the study's own folder."""
    jobs: int = 1
    """Stages that run at once, each with its share of the cores."""
    minutes: float | None = None
    """After so many minutes no further stage begins; what is missing is "not run"."""
    only: str = ""
    """Arms to train, comma-separated; the table has all. Empty: every arm."""
    train: bool = True
    """False writes the table of what is there."""


def run_study(arguments: Sequence[str]) -> Path:
    """Run a study named by the first of ``arguments``; returns the table.

    Raises ConfigError for a study or arm that cannot run, before any work, and RunError when a cell failed, after the
    table was written.
    """
    if not arguments:
        raise RunError("octaves study needs a study: a YAML, or the name of one in configs/studies")
    path = find_study(arguments[0])
    request, overrides = read_request(arguments[1:])
    study = load_study(path)
    cells = cells_of(study, Path(request.out) / "runs", overrides)
    chosen = [part.strip() for part in request.only.split(",") if part.strip()]
    arms = [arm.name for arm in study.arms]
    if foreign := [name for name in chosen if name not in arms]:
        raise RunError(f"only={foreign[0]}: no such arm; allowed: {', '.join(arms)}")
    outcome = outdated(cells)
    try:
        if request.train:
            wanted = [cell for cell in cells if not chosen or cell.arm in chosen]
            train(wanted, request.jobs, request.minutes, outcome)
    finally:
        table = write_tables(study, path.stem, cells, outcome, Path(request.out) / path.stem)
    print(f"\n{table.read_text(encoding='utf-8')}\nwrote {table} and cells.csv, study.json, plot.png beside it")
    failed = [(cell, line) for cell in cells if (line := outcome.reason(cell)) is not None]
    if failed:
        cell, line = failed[0]
        raise RunError(
            f"{len(failed)} of {len(cells)} cells failed; the first, {cell.arm} with seed {cell.seed}: {line}"
        )
    return table


def read_request(arguments: Sequence[str]) -> tuple[StudyRequest, list[str]]:
    """(the command's own keys, overrides). Raises RunError for a wrong value."""
    request, overrides = StudyRequest(), []
    own = {field.name for field in fields(StudyRequest)}
    for item in arguments:
        key, equals, value = item.partition("=")
        if key not in own or not equals:
            overrides.append(item)
        elif key in ("jobs", "minutes"):
            try:
                number = int(value) if key == "jobs" else float(value)
            except ValueError as error:
                raise RunError(f"{item}: allowed is a number") from error
            if number < (1 if key == "jobs" else 0):
                raise RunError(f"{item}: allowed is {'1' if key == 'jobs' else '0'} or more")
            setattr(request, key, number)
        elif key == "train":
            if value not in ("true", "false"):
                raise RunError(f"{item}: allowed is true or false")
            request.train = value == "true"
        else:
            setattr(request, key, value)
    return request, overrides
