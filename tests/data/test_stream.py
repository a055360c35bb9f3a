"""Index stream: the same batches for one or several processes, and when resumed."""

from itertools import chain, islice

import numpy as np
import pytest

from data.stream import BucketedStream, IndexStream

SHAPES = [(10, 4, 2), (3, 4, 3), (64, 8, 1), (7, 1, 2)]


def first(count: int, **options: int) -> list[list[tuple[int, int]]]:
    return list(islice(IndexStream(**options), count))


@pytest.mark.parametrize(("length", "batch_size", "world_size"), SHAPES)
def test_ranks_together_take_the_batches_of_one_process(length: int, batch_size: int, world_size: int) -> None:
    alone = first(12, length=length, batch_size=batch_size * world_size, seed=5)
    ranks = [
        first(12, length=length, batch_size=batch_size, rank=rank, world_size=world_size, seed=5)
        for rank in range(world_size)
    ]
    assert alone == [list(chain(*batches)) for batches in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("length", "batch_size", "world_size"), SHAPES)
def test_every_epoch_covers_every_index_once(length: int, batch_size: int, world_size: int) -> None:
    pairs = list(chain(*first(60, length=length, batch_size=batch_size * world_size, seed=1)))
    for epoch in range(pairs[-1][0]):
        assert sorted(index for number, index in pairs if number == epoch) == list(range(length))


@pytest.mark.parametrize(("length", "batch_size", "world_size"), SHAPES)
@pytest.mark.parametrize("start", [1, 3, 11])
def test_resumed_stream_continues_exactly(length: int, batch_size: int, world_size: int, start: int) -> None:
    options = {"length": length, "batch_size": batch_size, "rank": world_size - 1, "world_size": world_size, "seed": 2}
    assert first(8, **options, start_batch=start) == first(8 + start, **options)[start:]


def test_epochs_and_seeds_differ() -> None:
    one, two = first(2, length=50, batch_size=50, seed=0)
    other = first(1, length=50, batch_size=50, seed=1)[0]
    orders = [[index for _, index in batch] for batch in (one, two, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    "wrong",
    [{"length": 0}, {"batch_size": 0}, {"rank": 2}, {"start_batch": -1}],
)
def test_impossible_streams_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        IndexStream(**{"length": 4, "batch_size": 2, "world_size": 2, **wrong})


LENGTHS = np.random.default_rng(0).integers(1, 1000, 100)


def bucketed(count: int, window: int = 8, **options: int) -> list[list[tuple[int, int]]]:
    return list(islice(BucketedStream(LENGTHS, window, **{"batch_size": 4, "seed": 3, **options}), count))


def test_buckets_hold_the_same_samples_sorted_by_length() -> None:
    plain = list(chain(*first(50, length=100, batch_size=4, seed=3)))
    found = list(chain(*bucketed(48)))
    for start in range(0, 6 * 32, 32):
        assert sorted(found[start : start + 32]) == sorted(plain[start : start + 32])

    def padding(batches: list[list[tuple[int, int]]]) -> float:
        lengths = [[LENGTHS[index] for _, index in batch] for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(4 * max(batch) for batch in lengths)

    assert padding(bucketed(48)) < padding(bucketed(48, window=1)) / 3
    means = [np.mean([LENGTHS[index] for _, index in batch]) for batch in bucketed(16)]
    assert means[:8] != sorted(means[:8])  # batches are not always in order of length


@pytest.mark.parametrize("world_size", [1, 3])
def test_buckets_are_dealt_out_and_resumed_like_plain_batches(world_size: int) -> None:
    alone = bucketed(30, batch_size=2 * world_size)
    ranks = [bucketed(30, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert alone == [list(chain(*batches)) for batches in zip(*ranks, strict=True)]
    for start in (1, 8, 21):
        options = {"batch_size": 2, "rank": world_size - 1, "world_size": world_size}
        assert bucketed(9, **options, start_batch=start) == bucketed(30, **options)[start : start + 9]


def test_a_batch_of_a_small_set_has_no_more_copies_than_a_plain_one() -> None:
    for batch in bucketed(60, window=1000, batch_size=20):
        assert len({index for _, index in batch}) == 20


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 0 batches"):
        BucketedStream(LENGTHS, 0, 4)
