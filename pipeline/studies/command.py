"""study: train all missing cells of a study, and write one table of all cells."""

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
    """Keys of ``study``; every other ``key=value`` overrides the configs of all arms."""

    out: str = "runs/studies"
    """Folder of all studies: runs are in ``runs`` and shared by studies, tables in a folder per study."""
    jobs: int = 1
    """Number of stages that run at once, each with its share of the cores."""
    minutes: float | None = None
    """After this time no further stage starts; missing cells are listed as "not run"."""
    only: str = ""
    """Arms to train, comma-separated; empty: all. The table always contains all arms."""
    train: bool = True
    """False only writes the table of existing results."""


def run_study(arguments: Sequence[str]) -> Path:
    """Run the study named by the first of ``arguments``. Returns the path of the table.

    Raises ConfigError for a study or arm that cannot run, before any work; RunError if a cell failed, after the table
    is written.
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
            selected = [cell for cell in cells if not chosen or cell.arm in chosen]
            train(selected, request.jobs, request.minutes, outcome)
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
    """(keys of the command, overrides). Raises RunError for an invalid value."""
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
                raise RunError(f"{item}; allowed: a number") from error
            if number < (1 if key == "jobs" else 0):
                raise RunError(f"{item}; allowed: {'1' if key == 'jobs' else '0'} or more")
            setattr(request, key, number)
        elif key == "train":
            if value not in ("true", "false"):
                raise RunError(f"{item}; allowed: true or false")
            request.train = value == "true"
        else:
            setattr(request, key, value)
    return request, overrides
