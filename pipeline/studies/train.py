"""Training and evaluating the cells of a study: one process a stage, several runs side by side.

Every stage is the command that a user would give, so it resumes as that does; what is finished is not done again. Cells
that share a stage wait for it; two priors of one tokenizer train side by side. A stage that fails takes all cells that
need it with it; the others go on.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.files import write_atomically
from pipeline.cores import environment_beside
from pipeline.processes import REQUEUE, prepare_child
from pipeline.run import defaults_of, difference_from, stage_config
from pipeline.studies.plan import Cell

POLL_SECONDS = 0.5
GRACE_SECONDS = 120.0
"""How long stages may take to save after SIGTERM."""
STAGES = {"train-tokenizer": "tokenizer", "cache-tokens": "tokens", "train-prior": "prior"}
"""Commands that hold their folder to one config, and the sections of it (``STAGE_SECTIONS``)."""


@dataclass(eq=False)
class Job:
    """One stage of one cell, running."""

    cell: Cell
    stage: str
    begun: float
    process: subprocess.Popen[bytes] = field(init=False, repr=False)

    @property
    def made(self) -> Path:
        """The file that the stage writes last."""
        return dict(self.cell.stages)[self.stage]

    @property
    def log(self) -> Path:
        """What the stage prints; several stages of one run may be running."""
        parts = self.made.relative_to(self.cell.run).parent.parts
        return self.cell.run / f"study-{'-'.join(parts)}.log"


@dataclass
class Outcome:
    """What training the cells came to, as far as it did not work."""

    failed: dict[Path, str] = field(default_factory=dict)
    """What a stage that failed would have written, or what it wrote with another config: why."""

    def reason(self, cell: Cell) -> str | None:
        """Why a cell has no evaluation; None where nothing failed."""
        return next((self.failed[made] for _, made in cell.stages if made in self.failed), None)


def outdated(cells: Sequence[Cell]) -> Outcome:
    """What was made with another config than the cell's: runs are named by keys that differ from their defaults, and a
    newer version may have other defaults."""
    outcome = Outcome()
    for cell in cells:
        for stage, made in cell.stages:
            if stage in STAGES and made.exists() and (made.parent / "config.yaml").exists():
                difference = difference_from(
                    made.parent, stage_config(cell.config, STAGES[stage]), defaults_of(cell.config)
                )
                if difference:
                    outcome.failed[made] = f"{made.parent} was made with another config ({difference}); delete it"
    return outcome


def train(cells: Sequence[Cell], jobs: int, minutes: float | None, outcome: Outcome) -> None:
    """Run what is missing, ``jobs`` processes at once; after ``minutes`` (None: no limit) no stage begins.

    Cells that ``outcome`` has as failed are left out, and those that fail are put there. SIGTERM (Preempted) and Ctrl-C
    are passed on to the stages, which save.
    """
    running: list[Job] = []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        while True:
            for job in list(running):
                if (line := finished(job)) is not None:
                    running.remove(job)
                    if line:
                        outcome.failed[job.made] = line
                        print(f"{job.cell.arm}, seed {job.cell.seed}: {job.stage} failed: {line}", flush=True)
            late = end is not None and time.monotonic() > end
            while len(running) < jobs and not late and (found := next_stage(cells, running, outcome)):
                running.append(start(*found, jobs))
            if not running:
                return
            time.sleep(POLL_SECONDS)
    finally:
        for job in running:
            job.process.terminate()
        grace = time.monotonic() + GRACE_SECONDS
        while running := [job for job in running if finished(job) is None]:
            if time.monotonic() > grace:
                for job in running:
                    job.process.kill()
            time.sleep(POLL_SECONDS)


def next_stage(cells: Sequence[Cell], running: Sequence[Job], outcome: Outcome) -> tuple[Cell, str] | None:
    """The first stage that is missing and that no running one holds up."""
    busy = {job.made for job in running}
    for cell in cells:
        if outcome.reason(cell) is not None:
            continue
        stage, made = next(((name, made) for name, made in cell.stages if not made.exists()), (None, None))
        if stage is not None and made not in busy:
            return cell, stage
    return None


def start(cell: Cell, stage: str, jobs: int) -> Job:
    """Begin a stage; what it prints goes to its log in the cell's run."""
    cell.run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline", stage, *cell.command]
    job = Job(cell, stage, time.monotonic())
    print(f"{cell.arm}, seed {cell.seed}: octaves {shlex.join(command[3:])}", flush=True)
    with job.log.open("ab") as log:
        log.write(f"$ octaves {shlex.join(command[3:])}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_beside(jobs),  # commands that each take every core starve one another
            start_new_session=True,  # Ctrl-C is this process's to hear: a stage saves after SIGTERM alone
            preexec_fn=partial(prepare_child, os.getpid()),
        )
    return job


def finished(job: Job) -> str | None:
    """None while a job runs, "" when it has done its work, otherwise the last line that it printed."""
    pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
    if not pid:
        return None
    code = job.process.returncode = os.waitstatus_to_exitcode(status)
    remember(job, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
    if code == 0 and job.made.exists():
        print(
            f"{job.cell.arm}, seed {job.cell.seed}: {job.stage} done in {usage.ru_utime / 60:.1f} CPU min", flush=True
        )
        return ""
    if code == REQUEUE:
        return "stopped by SIGTERM"
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines and not lines[-1].startswith("$ ") else f"exit code {code}"


def remember(job: Job, seconds: float, megabytes: float) -> None:
    """Add what a stage took to ``study.json`` in its run, by the file that the stage makes."""
    path = job.cell.run / "study.json"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = str(job.made.relative_to(job.cell.run))
    before = {"cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_megabytes": 0.0} | seen.get(key, {})
    seen[key] = {
        "peak_megabytes": max(before["peak_megabytes"], megabytes),
        "cpu_seconds": before["cpu_seconds"] + seconds,
        "wall_seconds": before["wall_seconds"] + time.monotonic() - job.begun,
    }
    write_atomically(path, json.dumps(seen, indent=1).encode())


def effort(cell: Cell) -> dict[str, float | None] | None:
    """CPU minutes of training the cell's stages and the most memory that one took; None where nobody counted.

    Caching and evaluation are left out. Memory is the resident set of the training process, libraries and all.
    """
    path = cell.run / "study.json"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    own = [str(made.relative_to(cell.run)) for name, made in cell.stages if name.startswith("train")]
    if not all(key in seen for key in own):
        return None
    found = [seen[key] for key in own]
    return {
        "cpu_minutes": sum(each["cpu_seconds"] for each in found) / 60,
        "peak_megabytes": max((each["peak_megabytes"] for each in found if "peak_megabytes" in each), default=None),
    }
