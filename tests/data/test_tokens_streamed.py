"""Tokens at a URL: the same samples as from a folder, limited local storage, one-line errors for failed downloads."""

import gc
import os
import pickle
import shutil
import threading
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data.stream import BucketedStream, IndexStream, LookAhead, ShardOrder
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest
from data.tokens.module import TokenDataModule
from data.tokens.reader import TokenReader
from data.tokens.streamed import GIGABYTE, StreamedReader, open_tokens
from tests.data.test_token_captions import STATES, write_captioned
from tests.data.test_tokens import LAYOUTS, write_cache
from tests.data.token_server import asked, fail, serving
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset needs curl")
COUNTS = (5, 5, 4, 3, 5, 5, 2, 5, 5, 1)  # two blocks per shard: five shards


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVES_DATA", str(tmp_path / "home"))
    monkeypatch.setattr("data.remote.PAUSES", (0.01, 0.01))
    return tmp_path / "home/tokens"


@pytest.fixture
def stored(tmp_path):
    """A cache of five shards, and the URL at which a server provides it."""
    folder = tmp_path / "store"
    write_cache(folder, LAYOUTS["two fields and header"], COUNTS)
    with serving(folder) as url:
        yield folder, url


def kept(home):
    """Bytes of all local copies at one moment; if a copy is renamed or removed during the scan, scan again."""
    while True:
        with suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in home.iterdir() if ".tar" in path.name and path.suffix != ".lock")


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_those_of_the_folder(tmp_path, layout):
    write_cache(tmp_path / "store", LAYOUTS[layout], COUNTS)
    local = TokenReader(tmp_path / "store", "train")
    with serving(tmp_path / "store") as url:
        streamed = open_tokens(url, "train", 1.0)
        assert isinstance(streamed, StreamedReader) and len(streamed) == len(local) == sum(COUNTS)
        generator = np.random.default_rng(0)
        for _ in range(20):
            positions = generator.integers(0, len(local), 7)
            views = generator.integers(0, 2, 7)
            assert same(streamed.read(positions, views), local.read(positions, views))
            assert streamed.keys(positions) == local.keys(positions)
        again = pickle.loads(pickle.dumps(streamed))
        assert same(again.read(positions), local.read(positions))
    assert sorted(set(asked(tmp_path / "store"))) == [
        "/manifest.json",
        *(f"/train/{number:06d}.tar" for number in range(5)),
    ]
    assert len([path for path in asked(tmp_path / "store") if path.endswith(".tar")]) == 5
    for positions in ([len(local)], [-1]):
        with pytest.raises(IndexError):
            streamed.read(np.asarray(positions))


def test_captions_come_along(tmp_path):
    write_captioned(tmp_path / "store", STATES)
    local = TokenReader(tmp_path / "store", "train")
    with serving(tmp_path / "store") as url:
        streamed = open_tokens(url, "train", 1.0)
        positions = np.asarray([3, 0, 12, 7])
        assert same(streamed.read(positions, with_text=True), local.read(positions, with_text=True))
        assert np.array_equal(streamed.empty_caption(), local.empty_caption())


def test_no_more_bytes_lie_here_than_allowed_however_often_shards_come_and_go(stored, home):
    folder, url = stored
    local = TokenReader(folder, "train")
    limit = 2 * max(shard.bytes for shard in local.manifest.split("train").shards)
    readers = [StreamedReader(url, "train", limit) for _ in range(2)]
    positions = [np.random.default_rng(rank).integers(0, len(local), (15, 6)) for rank in (0, 1)]
    most, wrong = [], []

    def read(rank):
        for batch in positions[rank]:
            if not same(readers[rank].read(batch), local.read(batch)):
                wrong.append(batch)
            most.append(kept(home))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(most) == 30 and 0 < max(most) <= limit
    assert len([path for path in asked(folder) if path.endswith(".tar")]) > 5


def test_what_is_announced_is_there_before_it_is_read(stored, home):
    folder, url = stored
    streamed = StreamedReader(url, "train", GIGABYTE)
    streamed.announce(np.arange(len(streamed)))
    wanted = {streamed.store.path(shard) for shard in streamed.shards}
    wait_until(lambda: wanted <= set(home.glob("*.tar")), "all that was announced")
    wanted = TokenReader(folder, "train").read(np.arange(9))
    (folder / "train").rename(folder / "gone")
    assert same(streamed.read(np.arange(9)), wanted)


def test_a_broken_connection_is_tried_again(stored, home):
    folder, url = stored
    fail(folder, _000000=("dropped", 2), _000001=("corrupt", 1))
    streamed, local = StreamedReader(url, "train", GIGABYTE), TokenReader(folder, "train")
    everything = np.arange(len(local))
    assert same(streamed.read(everything), local.read(everything))
    assert [asked(folder).count(f"/train/{number:06d}.tar") for number in range(4)] == [3, 2, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_copy_comes_again_whoever_opens_it(stored, home, workers):
    folder, url = stored
    streamed, local = StreamedReader(url, "train", GIGABYTE), TokenReader(folder, "train")
    everything = np.arange(len(local))
    streamed.read(everything)
    damage = {3: lambda content: content[:700] + bytes([content[700] ^ 1]) + content[701:], 1: lambda content: b""}
    for number, change in damage.items():
        copy = streamed.store.path(streamed.shards[number])
        copy.write_bytes(change(copy.read_bytes()))
    place = {"batch_size": 8, "num_workers": workers, "seed": 0, "validation_samples": 4}
    batches = islice(TokenDataModule(url, **place).train_dataloader(), 8)  # more than one epoch
    wanted = islice(TokenDataModule(folder, **place).train_dataloader(), 8)
    assert all(same(one, other) for one, other in zip(batches, wanted, strict=True))
    fetched = [asked(folder).count(f"/train/{number:06d}.tar") for number in range(5)]
    assert fetched == [1, 2, 1, 2, 1]
    assert same(StreamedReader(url, "train", GIGABYTE).read(everything), local.read(everything))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_a_reader_lets_go_of_a_copy_that_has_come_again(stored, home):
    _, url = stored
    one, other = StreamedReader(url, "train", GIGABYTE), StreamedReader(url, "train", GIGABYTE)
    one.read(np.asarray([0]))
    copy = one.store.path(one.shards[0])

    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in lines if copy.name in line and line.endswith("(deleted)")]

    copy.unlink()
    other.read(np.asarray([0]))
    assert copy.exists() and len(mapped()) == 1
    one.read(np.asarray([len(one) - 1]))
    gc.collect()
    assert not mapped()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", r"exit code 22 \(no such file, or the server refuses it\)"),
        ("corrupt", "is not the shard of the manifest"),
        ("dropped", r"exit code 18 \(the connection broke\)"),
        ("stalled", "no data for 0.3 s"),
    ],
)
def test_what_never_comes_is_one_line_and_leaves_nothing(stored, home, monkeypatch, fault, said):
    folder, url = stored
    if fault == "stalled":
        monkeypatch.setattr("data.remote.STALL_SECONDS", 0.3)
    fail(folder, _000001=(fault, 99))
    streamed = StreamedReader(url, "train", GIGABYTE)
    with pytest.raises(CacheError, match=said) as caught:
        streamed.read(np.asarray([12]))  # the third sample of the second shard
    line = str(caught.value)
    assert f"{url}/train/000001.tar" in line and "\n" not in line
    assert asked(folder).count("/train/000001.tar") == (1 if fault == "missing" else 3)
    assert ("tried 3 times" in line) == (fault != "missing")
    assert [path.name for path in home.iterdir() if ".tmp-" in path.name] == []


def test_without_a_server_or_manifest_there_is_one_line(tmp_path, stored):
    folder, url = stored
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-200])
    with pytest.raises(CacheError, match="truncated or no JSON"):
        Manifest.load(url)
    (folder / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no token cache: .*manifest.json: .* exit code 22"):
        Manifest.load(url)
    with pytest.raises(CacheError, match="no connection"):
        Manifest.load("http://127.0.0.1:1")


def test_stores_have_programs_of_their_own(stored, tmp_path, monkeypatch):
    """A script stands in for ``aws`` writing an object to its standard output; pipes and file URLs work too."""
    folder, _ = stored
    program = tmp_path / "bin/aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{folder}/${{3#s3://bucket/to kens/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    local, positions = TokenReader(folder, "val"), np.asarray([20, 0, 7])
    for url in ("s3://bucket/to kens", f"pipe:cat {folder}", f"file://{folder}"):
        assert same(open_tokens(url, "val", 1.0).read(positions), local.read(positions))


# ---------------------------------------------------------------------- order


def test_an_epoch_goes_through_few_shards_at_a_time_and_through_all_of_them():
    sizes = [7, 5, 7, 7, 3]
    order = ShardOrder(sizes, 2)
    shard_of = np.repeat(np.arange(5), sizes)
    epochs = [order(0, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(29))
        starts = np.unique(shard_of[epoch], return_index=True)[1]
        first_seen = [int(shard_of[epoch[start]]) for start in sorted(starts)]
        place = 0
        for window in (first_seen[:2], first_seen[2:4], first_seen[4:]):
            samples = sum(sizes[shard] for shard in window)
            assert set(shard_of[epoch[place : place + samples]]) == set(window)
            place += samples
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert any(shard_of[epoch[0]] != shard_of[epochs[0][0]] for epoch in epochs)
    assert not np.array_equal(order(1, 0), order(0, 0)) and np.array_equal(order(0, 3), epochs[3])


def test_ranks_share_windows_and_any_batch_can_be_the_first():
    order = ShardOrder([7, 5, 7, 7, 3], 2)

    def take(count, *place):
        stream = iter(IndexStream(29, *place, order))
        return [next(stream) for _ in range(count)]

    whole = take(20, 8, 0, 1, 3, 0)
    ranks = [take(20, 4, rank, 2, 3, 0) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert take(9, 8, 0, 1, 3, 11) == whole[11:]
    buckets = BucketedStream(np.arange(29) % 5, 3, 8, 0, 1, 3, 0, order)
    drawn = [pair for _, batch in zip(range(3), buckets, strict=False) for pair in batch]
    assert sorted(drawn) == sorted(pair for batch in whole[:3] for pair in batch)


def test_batches_are_announced_before_their_turn_and_stay_the_same():
    stream, announced = IndexStream(29, 4, seed=1), []
    ahead = iter(LookAhead(stream, 3, lambda indices: announced.append(indices.tolist())))
    plain = iter(stream)
    for number in range(10):
        batch = next(ahead)
        assert batch == next(plain) and len(announced) == number + 4
        assert [index for _, index in batch] == announced[number]


def test_what_would_come_again_and_again_is_refused(stored, tmp_path):
    folder, url = stored
    sizes = sorted(shard.bytes for shard in Manifest.load(folder).split("train").shards)
    place = {"batch_size": 4, "num_workers": 0, "seed": 0, "validation_samples": 4}
    little = 4 * sizes[-1] / GIGABYTE
    with pytest.raises(CacheError, match="drawn from all shards at a time .prior_training.shuffle_shards=0."):
        TokenDataModule(url, **place, local_gigabytes=little)
    TokenDataModule(url, **place, local_gigabytes=little, shuffle_shards=1)
    TokenDataModule(url, **place)
    write_cache(tmp_path / "lists", LAYOUTS["ragged"], COUNTS)
    with serving(tmp_path / "lists") as lists:
        with pytest.raises(CacheError, match="set prior_training.bucket_batches=1"):
            TokenDataModule(lists, **place, bucket_batches=8)
        TokenDataModule(lists, **place)
