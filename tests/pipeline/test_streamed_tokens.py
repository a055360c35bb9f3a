"""train-prior and eval on a token cache at a URL: the bits of a run on the folder, through few bytes, and one line."""

import hashlib
import os
import re
import shutil
import signal
from functools import partial

import pytest

from data.tokens.manifest import Manifest
from stages.weights import read_weights
from tests.data.token_server import asked, fail, serving
from tests.reliability.commands import octaves, patch, signal_at, start, two
from tests.reliability.test_resume import STEPS, preempted

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset asks curl")


@pytest.fixture
def store(finished, tmp_path):
    """The finished run's tokens in shards of one block, the URL that gives them, and the run's tokenizer."""
    tokenizer = f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"
    keys = [f"tokens.path={tmp_path}/store", "tokens.blocks_per_shard=1", tokenizer]
    assert octaves(tmp_path, "cache-tokens", finished / "tiny.yaml", f"run={tmp_path}/run", *keys).code == 0
    with serving(tmp_path / "store") as url:
        yield tmp_path / "store", url


def command(finished, run, path, *keys):
    tokenizer = f"tokenizer.path={finished}/run/tokenizer/tokenizer.safetensors"
    fixed = ["tokens.blocks_per_shard=1", "prior_training.shuffle_shards=1", tokenizer]
    return ["train-prior", finished / "tiny.yaml", f"run={run}", f"tokens.path={path}", *fixed, *keys]


def weights(run):
    return read_weights(run / "prior/prior.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def run_one(tmp_path, arguments, setup=None):
    return start(tmp_path, *arguments, setup=setup, OCTAVES_DATA=f"{tmp_path}/home").wait()


def at_home(tmp_path):
    """A setup: where copies go."""
    os.environ["OCTAVES_DATA"] = f"{tmp_path}/home"


def limit(folder):
    """Room for three training shards and a validation shard, of all there are."""
    manifest = Manifest.load(folder)
    train = sorted(shard.bytes for shard in manifest.splits["train"].shards)
    val = max(shard.bytes for shard in manifest.splits["val"].shards)
    return f"tokens.local_gigabytes={(sum(train[-3:]) + val + 1) / 1e9:.9f}"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_streams_and_is_stopped_ends_with_the_bits_of_one_that_does_neither(
    finished, store, tmp_path, workers
):
    folder, url = store
    keys = [limit(folder), f"trainer.num_workers={workers}"]
    assert run_one(tmp_path, command(finished, tmp_path / "local", folder)).code == 0
    streamed = command(finished, tmp_path / "streamed", url, *keys)
    assert preempted(run_one(tmp_path, streamed, signal_at(signal.SIGTERM, STEPS["prior"], 5)))
    fail(folder, _000000=("dropped", 1), _000001=("dropped", 1))
    ended = run_one(tmp_path, streamed)
    assert ended.code == 0 and "continuing from" in ended.said
    (told, one), (told_other, other) = weights(tmp_path / "local"), weights(tmp_path / "streamed")
    assert equal(one, other) and told["manifest_sha256"] == told_other["manifest_sha256"]
    # mixing a shard at a time is another order than mixing all
    assert not equal(one, weights(finished / "run")[1])


@pytest.mark.parametrize("then", ["another", "none"])
def test_a_manifest_that_changes_or_goes_while_training_changes_nothing(finished, store, tmp_path, then):
    folder, url = store
    path = folder / "manifest.json"
    first = path.read_bytes()
    change = partial(path.write_bytes, first.replace(b"\n", b"\n ")) if then == "another" else path.unlink
    setup = partial(patch, "pipeline.train:build_prior", 1, change)
    keys = ["prior_training.max_steps=2", "trainer.num_workers=1"]
    ended = run_one(tmp_path, command(finished, tmp_path / "run", url, *keys), setup)
    assert ended.code == 0 and asked(folder).count("/manifest.json") == 1, ended.said
    assert not path.exists() or path.read_bytes() != first
    assert weights(tmp_path / "run")[0]["manifest_sha256"] == hashlib.sha256(first).hexdigest()


def test_two_processes_fetch_each_shard_once(finished, store, tmp_path):
    folder, url = store
    for run, path in (("local", folder), ("streamed", url)):
        setup = partial(at_home, tmp_path)
        ended = two(tmp_path, *command(finished, tmp_path / run, path), setups=(setup, setup))
        assert [rank.code for rank in ended] == [0, 0], ended
    assert equal(weights(tmp_path / "local")[1], weights(tmp_path / "streamed")[1])
    shards = [path for path in asked(folder) if path.endswith(".tar")]
    assert len(shards) == len(set(shards)) > 2


def test_what_is_missing_or_foreign_is_one_line(finished, store, tmp_path):
    folder, url = store
    fail(folder, _000000=("missing", 99), _000001=("missing", 99), _000002=("missing", 99))
    said = re.escape(f"{url}/train/00000") + r"\d.tar: .*exit code 22"
    assert run_one(tmp_path, command(finished, tmp_path / "run", url, "trainer.num_workers=1")).refused(said)
    assert run_one(tmp_path, command(finished, tmp_path / "run", f"{url}/none")).refused("no token cache: .*none")
    cache = ["cache-tokens", finished / "tiny.yaml", f"run={tmp_path}/run", f"tokens.path={url}"]
    assert run_one(tmp_path, cache).refused("this command writes to a folder")
    # eval reads the manifest to see whether tokens and tokenizer belong together
    other = ["tokenizer_training.max_steps=1", "seed=1", f"run={tmp_path}/other"]
    assert run_one(tmp_path, ["train-tokenizer", finished / "tiny.yaml", *other]).code == 0
    for path in (folder, url):
        judged = ["eval", finished / "tiny.yaml", *other, f"tokens.path={path}"]
        assert run_one(tmp_path, judged).refused("the token cache was made by another tokenizer")
