"""Faults of disks, files, data and helpers: each command goes on, or ends with one line that says what to do."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from data.tokens.manifest import Manifest
from tests.reliability import places
from tests.reliability.cases import fast_are
from tests.reliability.commands import CONTEXT, octaves, patch, start_two, wrap
from tests.reliability.stages import FOLDERS, arguments, before, result


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where a process may not have mounts of its own; where everything must be installed it fails."""
    process = CONTEXT.Process(target=places.enter_namespace)
    process.start()
    process.join()
    if process.exitcode:
        assert not os.environ.get("CI"), "no user namespaces here"
        pytest.skip("no user namespaces here")


FULL = {
    "train-tokenizer, at the start": ("train-tokenizer", "pipeline.run:write_atomically", 1),
    "train-tokenizer, a checkpoint": ("train-tokenizer", "pipeline.checkpoints:write_atomically", 1),
    "train-tokenizer, the second checkpoint": ("train-tokenizer", "pipeline.checkpoints:write_atomically", 2),
    "train-tokenizer, the weights": ("train-tokenizer", "stages.weights:write_atomically", 1),
    "cache-tokens, a shard": ("cache-tokens", "data.tokens.shards:ShardWriter.write", 2),
    "cache-tokens, a sidecar": ("cache-tokens", "data.tokens.shards:write_atomically", 2),
    "cache-tokens, the manifest": ("cache-tokens", "data.tokens.manifest:write_atomically", 1),
    "train-prior, a checkpoint": ("train-prior", "pipeline.checkpoints:write_atomically", 1),
    "train-prior, the weights": ("train-prior", "stages.weights:write_atomically", 1),
    "eval, the samples": ("eval", "pipeline.evaluate:measure_samples", 1),
    "eval, the figures": ("eval", "pipeline.evaluate:write_atomically", 1),
}


FAST = (
    "train-tokenizer, a checkpoint",
    "cache-tokens, a sidecar",
    "train-prior, the weights",
    "eval, the figures",
)


@pytest.mark.parametrize("moment", fast_are(FAST, FULL))
def test_full_disk(tmp_path: Path, stages: Path, finished: Path, namespaces: None, moment: str) -> None:
    """A tmpfs fills up at a write: one line, no half file; after space is made, the files of an undisturbed run."""
    command, where, call = FULL[moment]
    run, out = before(command, stages, tmp_path / "run"), tmp_path / "out"
    given = arguments(command, finished, run)
    ended = octaves(tmp_path, *given, setup=partial(places.full_disk, run, where, call, given, out))
    assert "FULL DISK: code 2, left behind []" in ended.said and ended.code == 0, ended.said
    (line,) = ended.lines
    assert "No space left on device; free some, then run the same command again" in line
    assert result(out, command) == result(stages / "run", command)


@pytest.mark.parametrize("command", FOLDERS)
def test_read_only_run(tmp_path: Path, stages: Path, finished: Path, namespaces: None, command: str) -> None:
    """A run folder on a read-only mount: one line."""
    run = before(command, stages, tmp_path / "run")
    ended = octaves(tmp_path, *arguments(command, finished, run), setup=partial(places.read_only, run))
    assert ended.refused(str(run), "Read-only file system; choose a writable run= or out="), ended


def test_read_only_parts_of_another_run_are_enough(
    tmp_path: Path, stages: Path, finished: Path, namespaces: None
) -> None:
    """Tokenizer and cache on a read-only mount: a prior is trained from them."""
    run = before("train-prior", stages, tmp_path / "run")
    parts = [f"tokens.path={run}/tokens", f"tokenizer.path={run}/tokenizer/tokenizer.safetensors"]
    given = [*arguments("train-prior", finished, tmp_path / "own"), *parts]
    assert octaves(tmp_path, *given, setup=partial(places.read_only, run)).code == 0
    assert result(tmp_path / "own", "train-prior") == result(stages / "run", "train-prior")


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[int(how.removeprefix("bit flipped at ").rstrip("%")) * (len(content) - 1) // 100] ^= 1
        path.write_bytes(content)


HOWS = ["missing", "truncated", "empty", *(f"bit flipped at {percent}%" for percent in (0, 23, 50, 71, 100))]
FILES = {
    "shard": ("tokens/train/000001.tar", "train-prior"),
    "manifest": ("tokens/manifest.json", "train-prior"),
    "tokenizer": ("tokenizer/tokenizer.safetensors", "eval"),
    "prior": ("prior/prior.safetensors", "sample"),
}


FAST_HOWS = {
    ("shard", "bit flipped at 50%"),
    ("manifest", "truncated"),
    ("tokenizer", "bit flipped at 71%"),
    ("prior", "missing"),
}


@pytest.mark.parametrize(("file", "how"), fast_are(FAST_HOWS, product(FILES, HOWS)))
def test_damaged_file(tmp_path: Path, stages: Path, finished: Path, file: str, how: str) -> None:
    """A file is missing, truncated, empty or has a flipped bit: one line names it, and it can be made again."""
    name, command = FILES[file]
    run = tmp_path / "run"
    shutil.copytree(stages / "run", run)
    if command == "train-prior":
        shutil.rmtree(run / "prior")
    damage(run / name, how)
    ended = octaves(tmp_path, *arguments(command, finished, run))
    assert ended.refused(Path(name).name), ended
    makes = {"tokenizer": "train-tokenizer", "prior": "train-prior"}
    if file != "shard":  # a damaged shard is found and written again
        (run / name).unlink(missing_ok=True)
    assert octaves(tmp_path, *arguments(makes.get(file, "cache-tokens"), finished, run)).code == 0
    assert (run / name).read_bytes() == (stages / "run" / name).read_bytes()


@pytest.mark.parametrize("how", fast_are(["truncated"], HOWS))
def test_damaged_sidecar(tmp_path: Path, stages: Path, finished: Path, how: str) -> None:
    """The same for a sidecar of a cache that is continued: its shard is written again, with the same bytes."""
    run = tmp_path / "run"
    shutil.copytree(stages / "run", run)
    damage(run / "tokens/train/000001.json", how)
    (run / "tokens/manifest.json").unlink()
    assert octaves(tmp_path, *arguments("cache-tokens", finished, run)).code == 0
    assert result(run, "cache-tokens") == result(stages / "run", "cache-tokens")


def rewrite(path: Path, how: str) -> None:
    if how == "no manifest at all":
        path.write_text('{"shards": []}')
    elif how == "a list":
        path.write_text("[1, 2]")
    elif how == "of a later version":
        path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    elif how == "of another cache":
        manifest = Manifest.load(path.parent)
        path.unlink()
        Manifest(**{**vars(manifest), "tokenizer_sha256": "0" * 64}).save(path.parent)


@pytest.mark.parametrize("how", ["no manifest at all", "a list", "of a later version", "of another cache"])
def test_foreign_manifest(tmp_path: Path, stages: Path, finished: Path, how: str) -> None:
    """A manifest that is foreign, of a later version or of another cache: one line."""
    run = before("train-prior", stages, tmp_path / "run")
    rewrite(run / "tokens/manifest.json", how)
    assert octaves(tmp_path, *arguments("train-prior", finished, run)).refused("manifest|another tokenizer")


def poison(call: int) -> None:
    """A setup: one pixel of a batch is not a number."""

    def with_nan(original, calls, self, batch, index):
        if calls == call:
            batch["pixels"][0, 0, 0, 0] = torch.nan
        return original(self, batch, index)

    wrap("stages.tokenizer.module:TokenizerModule.training_step", with_nan)


@pytest.mark.parametrize("rank", fast_are([1], [0, 1]))
def test_nan_in_the_batch_of_one_rank(tmp_path: Path, stages: Path, finished: Path, rank: int) -> None:
    """A pixel in one rank's batch is NaN: a line on both ranks, that rank's names the images; nothing is updated."""
    setups = [None, None]
    setups[rank] = partial(poison, 5)
    given = arguments("train-tokenizer", finished, tmp_path / "run")
    ended = [process.wait() for process in start_two(tmp_path, *given, setups=tuple(setups))]
    assert ended[rank].refused(r"step 4: pixel is nan; samples: \w+/\d+.png"), ended
    assert ended[1 - rank].refused("step 4: the loss of another process is not finite"), ended
    saved = sorted(path.name for path in (tmp_path / "run/tokenizer/checkpoints").iterdir())
    assert saved == ["step00000006.ckpt"] and not (tmp_path / "run/tokenizer/tokenizer.safetensors").exists()


def kill_children() -> None:
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize(
    ("command", "where"),
    fast_are(
        [("cache-tokens", "pipeline.encoding:Encoding.predict_step")],
        [
            ("train-tokenizer", "stages.tokenizer.module:TokenizerModule.training_step"),
            ("cache-tokens", "pipeline.encoding:Encoding.predict_step"),
            ("train-prior", "stages.prior.module:PriorModule.training_step"),
        ],
    ),
)
def test_a_loader_process_dies(tmp_path: Path, stages: Path, finished: Path, command: str, where: str) -> None:
    """kill -9 of a loader process: one line (or all was read already), and the same files in the end."""
    run = before(command, stages, tmp_path / "run")
    given = [*arguments(command, finished, run), "trainer.num_workers=1"]
    ended = octaves(tmp_path, *given, setup=partial(patch, where, 2, kill_children))
    assert ended.refused("a loader process has ended") or ended.code == 0, ended  # it may have read all by then
    assert octaves(tmp_path, *given).code == 0
    assert result(run, command) == result(stages / "run", command)


def test_a_loader_process_meets_a_corrupt_image(tmp_path: Path, stages: Path, finished: Path) -> None:
    """A loader process meets an unreadable image: one line."""
    run = before("cache-tokens", stages, tmp_path / "run")
    images = next(line for line in (finished / "tiny.yaml").read_text().splitlines() if "path: " in line)
    shutil.copytree(images.split("path: ")[1].split(",")[0], tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    given = [*arguments("cache-tokens", finished, run), f"images.path={tmp_path}/images", "trainer.num_workers=1"]
    assert octaves(tmp_path, *given).refused(r"\.png")


NAMES = {"not ASCII": "прогон 日本語 é ️🦉", "1600 characters": "/".join(["x" * 200] * 8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_path_that_is(tmp_path: Path, stages: Path, finished: Path, name: str) -> None:
    """Paths that are not ASCII or very long: all stages."""
    run = tmp_path / name
    for command in FOLDERS:
        ended = octaves(tmp_path, *arguments(command, finished, run))
        assert ended.code == 0, ended.said
        assert result(run, command).keys() == result(stages / "run", command).keys()


@pytest.mark.parametrize("command", FOLDERS)
def test_a_name_longer_than_file_systems_take(tmp_path: Path, finished: Path, command: str) -> None:
    """A name of 300 characters: one line."""
    ended = octaves(tmp_path, *arguments(command, finished, tmp_path / ("x" * 300)))
    assert ended.refused("File name too long; choose a shorter|is missing"), ended
