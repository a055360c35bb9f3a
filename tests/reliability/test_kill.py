"""kill -9 of every stage at many moments: nothing stays behind, and the next call ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.cases import fast_are
from tests.reliability.commands import kill_at, nobody_left, octaves, start, start_two, two
from tests.reliability.stages import arguments, before, result
from tests.waiting import PATIENCE, wait_until

PUBLISH = "data.files:os.replace"
SYNC = "data.files:os.fsync"
TOKENIZER, PRIOR = "stages.tokenizer.module:TokenizerModule", "stages.prior.module:PriorModule"
TRAINING = {
    "before the first update": ("{module}.training_step", 1),
    "in an update": ("{module}.training_step", 5),
    "in a validation": ("{module}.validation_step", 1),
    # the first file that a stage writes is its config, then come two checkpoints, then the weights
    "a checkpoint half written": (SYNC, 3),
    "a checkpoint without its name": (PUBLISH, 2),
    "weights half written": ("stages.weights:write_atomically", 1),
}
MOMENTS: dict[str, dict[str, tuple[str, int]]] = {
    "train-tokenizer": {
        "while statistics are fitted": ("pipeline.train:read_eval", 3),
        **{name: (at.format(module=TOKENIZER), n) for name, (at, n) in TRAINING.items()},
    },
    "cache-tokens": {
        "before the first shard": ("pipeline.encoding:Encoding.predict_step", 1),
        "a shard half written": ("data.tokens.shards:ShardWriter.write", 2),
        "a shard without its name": ("data.tokens.shards:publish", 2),
        "a shard without its sidecar": ("data.tokens.shards:write_atomically", 2),
        "all shards, no manifest": ("data.tokens.manifest:write_atomically", 1),
    },
    "train-prior": {
        "while the cache is read": ("data.tokens.reader:TokenReader.verify", 1),
        **{name: (at.format(module=PRIOR), n) for name, (at, n) in TRAINING.items()},
    },
    "eval": {
        "before the first figure": ("pipeline.evaluate:read_images", 1),
        "while samples are drawn": ("pipeline.evaluate:measure_samples", 1),
        "samples, no pictures": ("pipeline.evaluate_samples:show_samples", 1),
        "before the report": ("pipeline.evaluate:write_report", 1),
        "a report, no figures": ("pipeline.evaluate:write_atomically", 1),
    },
}
FAST = {
    "train-tokenizer": "a checkpoint half written",
    "cache-tokens": "a shard without its sidecar",
    "train-prior": "in an update",
    "eval": "a report, no figures",
}
RANDOM = 2  # further moments for each stage, anywhere between start and end


@pytest.mark.parametrize(
    ("command", "moment"),
    fast_are(FAST.items(), [(command, moment) for command, moments in MOMENTS.items() for moment in moments]),
)
def test_killed_at_a_moment(tmp_path: Path, stages: Path, finished: Path, command: str, moment: str) -> None:
    """kill -9 at a chosen call of a function: the next call makes the files of an undisturbed run."""
    run = before(command, stages, tmp_path / "run")
    killed = octaves(tmp_path, *arguments(command, finished, run), setup=kill_at(*MOMENTS[command][moment]))
    assert killed.code == -signal.SIGKILL, killed.said
    again = octaves(tmp_path, *arguments(command, finished, run))
    assert again.code == 0, again.said
    assert result(run, command) == result(stages / "run", command)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "number"), [(command, n) for command in MOMENTS for n in range(RANDOM)])
def test_killed_at_any_time(tmp_path: Path, stages: Path, finished: Path, command: str, number: int) -> None:
    """kill -9 after a random (seeded) share of a command's time: the same."""
    run = before(command, stages, tmp_path / "run")
    share = random.Random(f"{command} {number}").random()
    running = start(tmp_path, *arguments(command, finished, run))
    time.sleep(share * float((stages / f"{command}.seconds").read_text()))
    running.process.kill()
    assert running.wait().code in (-signal.SIGKILL, 0)
    assert octaves(tmp_path, *arguments(command, finished, run)).code == 0
    assert result(run, command) == result(stages / "run", command)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first process", "second process"])
@pytest.mark.parametrize("command", ["train-tokenizer", "cache-tokens", "train-prior"])
def test_one_of_two_ranks_killed(tmp_path: Path, stages: Path, finished: Path, command: str, victim: str) -> None:
    """kill -9 of one of two ranks that a launcher started: one line from the other, the same files in the end."""
    run, whole = (before(command, stages, tmp_path / name) for name in ("run", "whole"))
    kill = kill_at(
        {
            "train-tokenizer": "stages.tokenizer.module:TokenizerModule.training_step",
            "cache-tokens": "pipeline.encoding:Encoding.predict_step",
            "train-prior": "stages.prior.module:PriorModule.training_step",
        }[command],
        2 if command == "cache-tokens" else 5,
    )
    number = ["first process", "second process"].index(victim)
    setups: list[Callable[[], object] | None] = [None, None]
    setups[number] = kill
    ranks = [rank.wait() for rank in start_two(tmp_path, *arguments(command, finished, run), setups=tuple(setups))]
    assert ranks[number].code == -signal.SIGKILL
    assert ranks[1 - number].refused("another process of this run has ended; run the same command again"), ranks
    for folder in (run, whole):
        assert [rank.code for rank in two(tmp_path, *arguments(command, finished, folder))] == [0, 0]
    assert result(run, command) == result(whole, command)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_rank_that_the_command_started_itself_is_killed(tmp_path: Path, stages: Path, finished: Path) -> None:
    """kill -9 of a rank of the real command line with two ranks and loaders: one line says which, nobody left."""
    run = before("train-prior", stages, tmp_path / "run")
    command = [sys.executable, "-m", "pipeline", *arguments("train-prior", finished, run)]
    overrides = ["trainer.devices=2", "trainer.num_workers=1", "prior_training.max_steps=100000"]
    process = subprocess.Popen([*command, *overrides], stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        saved = (run / "prior/checkpoints").glob
        wait_until(lambda: list(saved("step*.ckpt")) or process.poll() is not None, "a checkpoint")
        assert process.poll() is None
        (rank,) = [pid for pid in children(process.pid) if "LOCAL_RANK=1" in environment(pid)]
        subprocess.run(["kill", "-9", str(rank)], check=True)
        said = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("octaves: ")]
    assert lines == ["octaves: process 1 of this run was killed (signal 9); run the same command again to continue"]
    assert nobody_left(process.pid)


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
