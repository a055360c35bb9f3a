"""Training and evaluation of the cells of a study: one process per stage, several at once.

Every stage is an ordinary command, so it resumes like one; finished stages are not repeated. Cells that share a stage
wait for it; two priors of one tokenizer train side by side. If a stage fails, all cells that need it fail; the others
continue.
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
"""Commands that check the config of their folder, and the stage name of that config (``STAGE_SECTIONS``)."""


@dataclass(eq=False)
class Job:
    """A running stage of a cell."""

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
        """Log file of the stage. Several stages of one run may be running."""
        parts = self.made.relative_to(self.cell.run).parent.parts
        return self.cell.run / f"study-{'-'.join(parts)}.log"


@dataclass
class Outcome:
    """What went wrong while training the cells."""

    failed: dict[Path, str] = field(default_factory=dict)
    """Reason by file: the file that a failed stage would have written, or one that was made with another config."""

    def reason(self, cell: Cell) -> str | None:
        """Why a cell has no evaluation; None if nothing failed."""
        return next((self.failed[output] for _, output in cell.stages if output in self.failed), None)


def outdated(cells: Sequence[Cell]) -> Outcome:
    """Find files that were made with another config than the cell's.

    Runs are named by keys that differ from their defaults, and a newer version may have other defaults.
    """
    outcome = Outcome()
    for cell in cells:
        for stage, output in cell.stages:
            if stage in STAGES and output.exists() and (output.parent / "config.yaml").exists():
                difference = difference_from(
                    output.parent, stage_config(cell.config, STAGES[stage]), defaults_of(cell.config)
                )
                if difference:
                    outcome.failed[output] = f"{output.parent} was made with another config ({difference}); delete it"
    return outcome


def train(cells: Sequence[Cell], jobs: int, minutes: float | None, outcome: Outcome) -> None:
    """Run missing stages, ``jobs`` processes at once; after ``minutes`` (None: no limit) no stage starts.

    Cells that ``outcome`` lists as failed are skipped; new failures are added to it. SIGTERM (Preempted) and Ctrl-C are
    passed on to the stages, which save.
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
            while len(running) < jobs and not late and (job_spec := next_stage(cells, running, outcome)):
                running.append(start(*job_spec, jobs))
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
    """The first missing stage that no running stage blocks."""
    busy = {job.made for job in running}
    for cell in cells:
        if outcome.reason(cell) is not None:
            continue
        stage, output = next(((name, output) for name, output in cell.stages if not output.exists()), (None, None))
        if stage is not None and output not in busy:
            return cell, stage
    return None


def start(cell: Cell, stage: str, jobs: int) -> Job:
    """Start a stage; its output goes to its log in the run of the cell."""
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
            env=environment_beside(jobs),  # commands that use all cores would slow each other down
            start_new_session=True,  # only this process receives Ctrl-C: stages save on SIGTERM
            preexec_fn=partial(prepare_child, os.getpid()),
        )
    return job


def finished(job: Job) -> str | None:
    """None while a job runs, "" if it was successful, otherwise the last line of its output."""
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
    """Add the resources that a stage used to ``study.json`` in its run, under the file that the stage writes."""
    path = job.cell.run / "study.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = str(job.made.relative_to(job.cell.run))
    totals = {"cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_megabytes": 0.0} | recorded.get(key, {})
    recorded[key] = {
        "peak_megabytes": max(totals["peak_megabytes"], megabytes),
        "cpu_seconds": totals["cpu_seconds"] + seconds,
        "wall_seconds": totals["wall_seconds"] + time.monotonic() - job.begun,
    }
    write_atomically(path, json.dumps(recorded, indent=1).encode())


def effort(cell: Cell) -> dict[str, float | None] | None:
    """CPU minutes of training for the cell's stages and peak memory of one of them; None if not recorded.

    Caching and evaluation are not included. Memory is the resident set of the training process, including libraries.
    """
    path = cell.run / "study.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files = [str(output.relative_to(cell.run)) for name, output in cell.stages if name.startswith("train")]
    if not all(key in recorded for key in files):
        return None
    entries = [recorded[key] for key in files]
    return {
        "cpu_minutes": sum(entry["cpu_seconds"] for entry in entries) / 60,
        "peak_megabytes": max(
            (entry["peak_megabytes"] for entry in entries if "peak_megabytes" in entry), default=None
        ),
    }
