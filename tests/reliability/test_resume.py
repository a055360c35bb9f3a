"""Exact resume: what SIGTERM ends goes on to the bits of a run that nothing disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoints import PATTERN
from pipeline.processes import REQUEUE
from stages.weights import read_weights
from tests.reliability.cases import fast_are
from tests.reliability.commands import Ended, nobody_left, octaves, signal_at, start, two
from tests.waiting import PATIENCE, wait_until

STEPS = {
    "tokenizer": "stages.tokenizer.module:TokenizerModule.training_step",
    "prior": "stages.prior.module:PriorModule.training_step",
}


def keys(finished: Path, stage: str, run: Path, accumulate: int) -> list[str]:
    """A command that trains ``stage`` in ``run``, the prior on the finished run's tokens."""
    parts = [f"tokens.path={finished}/run/tokens", f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"]
    return [
        f"train-{stage}",
        str(finished / "tiny.yaml"),
        f"run={run}",
        f"{stage}_training.accumulate_batches={accumulate}",
        *(parts if stage == "prior" else ()),
    ]


def tensors_equal(a: Path, b: Path, stage: str) -> bool:
    one, other = (read_weights(run / stage / f"{stage}.safetensors")[1] for run in (a, b))
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def checkpoints(run: Path, stage: str) -> list[str]:
    return [path.name for path in sorted((run / stage / "checkpoints").iterdir())]


def preempted(ended: Ended) -> bool:
    return ended.code == REQUEUE and len(ended.lines) == 1 and "run the same command again" in ended.lines[0]


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize(("accumulate", "call"), fast_are([(2, 7)], [(1, 5), (2, 7), (2, 8)]))
def test_sigterm_saves_and_the_next_call_ends_with_the_same_bits(
    tmp_path: Path, finished: Path, stage: str, accumulate: int, call: int
) -> None:
    """SIGTERM at a micro-batch, also inside an accumulated update: saved, 75, and the same bits in the end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert octaves(tmp_path, *keys(finished, stage, whole, accumulate)).code == 0
    command = keys(finished, stage, broken, accumulate)
    assert preempted(octaves(tmp_path, *command, setup=signal_at(signal.SIGTERM, STEPS[stage], call)))
    updates = -(-call // accumulate)
    counted = updates * (2 if stage == "tokenizer" else 1)  # Lightning counts the discriminator's, too
    assert checkpoints(broken, stage)[-1] == f"step{counted:08d}.ckpt"
    again = octaves(tmp_path, *command)
    assert again.code == 0 and "continuing from" in again.said
    assert tensors_equal(whole, broken, stage)
    assert len(checkpoints(broken, stage)) == 2


@pytest.mark.parametrize("stage", fast_are(["prior"], ["tokenizer", "prior"]))
def test_sigterm_to_one_of_two_ranks_stops_both_and_both_go_on(tmp_path: Path, finished: Path, stage: str) -> None:
    """SIGTERM to one of two ranks inside an accumulated update: both end with 75, the same bits in the end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert [rank.code for rank in two(tmp_path, *keys(finished, stage, whole, 2))] == [0, 0]
    command = keys(finished, stage, broken, 2)
    ended = two(tmp_path, *command, setups=(None, signal_at(signal.SIGTERM, STEPS[stage], 7)))
    assert all(map(preempted, ended)), ended
    assert [rank.code for rank in two(tmp_path, *command)] == [0, 0]
    assert tensors_equal(whole, broken, stage)


@pytest.mark.parametrize("stage", fast_are(["prior"], ["tokenizer", "prior"]))
def test_sigterm_in_a_validation_does_not_wait_for_its_end(tmp_path: Path, finished: Path, stage: str) -> None:
    """SIGTERM in a validation: it is not waited for, and the same bits in the end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert octaves(tmp_path, *keys(finished, stage, whole, 1)).code == 0
    command = keys(finished, stage, broken, 1)
    validation = STEPS[stage].replace("training_step", "validation_step")
    assert preempted(octaves(tmp_path, *command, setup=signal_at(signal.SIGTERM, validation, 1)))
    assert octaves(tmp_path, *command).code == 0
    assert tensors_equal(whole, broken, stage)


@pytest.mark.slow
def test_a_scheduler_that_signals_every_process_gets_the_code_to_requeue_on(tmp_path: Path, finished: Path) -> None:
    """SIGTERM to every process of the real command line, two ranks and their loaders: 75, nobody left."""
    arguments = [*keys(finished, "prior", tmp_path / "run", 1), "trainer.devices=2", "trainer.num_workers=1"]
    arguments += ["prior_training.max_steps=100000", "prior_training.checkpoint_every=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        saved = (tmp_path / "run/prior/checkpoints").glob
        wait_until(lambda: list(saved(PATTERN)) or process.poll() is not None, "a checkpoint")
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == REQUEUE, said
    assert "Traceback" not in said and "octaves: SIGTERM: saved " in said
    assert nobody_left(process.pid)


def test_sigterm_between_two_shards_keeps_the_finished_ones(tmp_path: Path, finished: Path) -> None:
    """SIGTERM between two shards: the finished ones stay, and the cache has the same bytes in the end."""
    command = ["cache-tokens", finished / "tiny.yaml", f"run={tmp_path}/run", "tokens.blocks_per_shard=1"]
    command += [f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"]
    at = "pipeline.encoding:Encoding.predict_step"
    assert preempted(octaves(tmp_path, *command, setup=signal_at(signal.SIGTERM, at, 2)))
    tokens = tmp_path / "run/tokens"
    assert len(list(tokens.glob("train/*.tar"))) == 1 and not list(tokens.glob("*/*.tmp-*"))
    assert octaves(tmp_path, *command).code == 0
    whole = octaves(tmp_path, *command, f"tokens.path={tmp_path}/whole")
    assert whole.code == 0
    for path in (tmp_path / "whole").rglob("*"):
        if path.suffix in (".tar", ".json"):
            assert path.read_bytes() == (tokens / path.relative_to(tmp_path / "whole")).read_bytes()


def damaged(how: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", fast_are(["bit flipped"], ["truncated", "empty", "bit flipped"]))
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, finished: Path, how: str
) -> None:
    """The newest checkpoint is damaged: it is named, the one before it is used, the same bits in the end."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run/prior", run / "prior")
    (run / "prior/prior.safetensors").unlink()
    (run / "prior/checkpoints/step00000009.ckpt.tmp-1").write_bytes(b"half")
    damaged(how, run / "prior/checkpoints/step00000006.ckpt")
    ended = octaves(tmp_path, *keys(finished, "prior", run, 1))
    assert ended.code == 0, ended.said
    assert "step00000006.ckpt is damaged" in ended.said and "continuing from" in ended.said
    assert checkpoints(run, "prior") == ["step00000003.ckpt", "step00000006.ckpt", "step00000006.damaged"]
    assert tensors_equal(finished / "run", run, "prior")


def test_without_a_whole_checkpoint_the_user_decides(tmp_path: Path, finished: Path) -> None:
    """All checkpoints are truncated: one line, and nothing is begun again unasked."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run/prior", run / "prior")
    (run / "prior/prior.safetensors").unlink()
    for path in (run / "prior/checkpoints").iterdir():
        damaged("truncated", path)
    before = checkpoints(run, "prior")
    for _ in range(2):
        assert octaves(tmp_path, *keys(finished, "prior", run, 1)).refused("no checkpoint in .* can be read; delete")
    assert checkpoints(run, "prior") == before


def test_a_command_that_has_nothing_to_save_ends_at_once(tmp_path: Path, finished: Path) -> None:
    """SIGTERM to an evaluation: 75 at once, and no figures."""
    running = start(
        tmp_path,
        "eval",
        finished / "tiny.yaml",
        f"run={tmp_path}/run",
        f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors",
        setup=signal_at(signal.SIGTERM, "pipeline.evaluate:read_images", 1),
    )
    assert preempted(running.wait())
    assert not (tmp_path / "run/eval/default/metrics.json").exists()
