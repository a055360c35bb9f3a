"""The endless stream of training indices, as a batch sampler.

What is notable here:

- epochs are concatenated and global batches are cut from the result, so there is no short batch, a set may be smaller
  than a batch, and every rank takes the same number of steps;
- batch k is a function of (length, batch size, world size, seed, k) alone: a resumed run starts at its batch by
  arithmetic and decodes nothing on the way;
- rank and world size are passed in by the main process. A loader worker cannot be trusted to know them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class ShardOrder:
    """Epochs that go through a set ``window`` shards at a time: their samples are mixed, and then come the next shards.

    The order of the shards, of ``sizes`` samples each, changes with every epoch. Samples of one shard must be no more
    alike than those of different ones. Raises ValueError for a window below 1.
    """

    def __init__(self, sizes: Sequence[int], window: int) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} shards; allowed: 1 or more")
        self.borders = np.cumsum([0, *sizes])
        self.window = window

    def __call__(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of all samples: int64 [sum of sizes]."""
        generator = np.random.default_rng([seed, 2, epoch])
        shards = generator.permutation(len(self.borders) - 1)
        order = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(shards), self.window):
            members = shards[start : start + self.window]
            together = np.concatenate([np.arange(self.borders[shard], self.borders[shard + 1]) for shard in members])
            order.append(generator.permutation(together))
        return np.concatenate(order)


class IndexStream(Sampler[list[tuple[int, int]]]):
    """Lists of ``batch_size`` pairs (epoch, index) for one rank, without end.

    Laid side by side, the batches of all ranks are the batches of a single process with ``batch_size * world_size``.
    Each epoch is its own permutation of ``range(length)``, drawn from (seed, epoch), or what ``order`` gives for these.

    Raises ValueError for an empty set, a batch size below 1, a rank outside the world, or a negative start.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_batch: int = 0,
        order: Callable[[int, int], np.ndarray] | None = None,
    ) -> None:
        if length < 1:
            raise ValueError("the set is empty: there is nothing to draw batches from")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; allowed: 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}; allowed: 0 to {world_size - 1} in a world of {world_size}")
        if start_batch < 0:
            raise ValueError(f"start_batch={start_batch}; allowed: 0 or more")
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_batch = start_batch
        self.order = order

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch: int64 [length]."""
        if self.order is not None:
            return self.order(self.seed, epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        position = (self.start_batch * self.world_size + self.rank) * self.batch_size
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = self.permutation(epoch)
                batch.append((epoch, int(order[place % self.length])))
            yield batch
            position += self.world_size * self.batch_size


class BucketedStream(IndexStream):
    """The same pairs, but ``window`` global batches are drawn together and dealt out anew, each of about one length.

    ``lengths`` [length] are the samples'. All ranks get batches of one length in the same step, and batch k is still a
    function of its number alone. Raises ValueError for a window below 1.
    """

    def __init__(self, lengths: np.ndarray, window: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(len(lengths), *args, **kwargs)
        if window < 1:
            raise ValueError(f"a window of {window} batches; allowed: 1 or more")
        self.lengths = lengths
        # a window that spans epochs would put the copies of a sample into one batch: they are equally long
        self.window = max(1, min(window, len(lengths) // (self.batch_size * self.world_size)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, skip = divmod(self.start_batch, self.window)
        joined = self.batch_size * self.world_size
        plain = iter(
            IndexStream(self.length, joined * self.window, seed=self.seed, start_batch=first, order=self.order)
        )
        for number, pairs in enumerate(plain, first):
            lengths = self.lengths[[index for _, index in pairs]]
            order = np.argsort(lengths, kind="stable").reshape(self.window, joined)
            shuffled = order[np.random.default_rng([self.seed, 1, number]).permutation(self.window)]
            for row in shuffled[skip:]:
                yield [pairs[place] for place in row[self.rank * self.batch_size :][: self.batch_size]]
            skip = 0


class LookAhead(Sampler[list[tuple[int, int]]]):
    """The batches of ``stream``; the indices of each are announced when it is still ``ahead`` batches away."""

    def __init__(self, stream: IndexStream, ahead: int, announce: Callable[[np.ndarray], None]) -> None:
        self.stream, self.ahead, self.announce = stream, ahead, announce

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        waiting: deque[list[tuple[int, int]]] = deque()
        for batch in self.stream:
            self.announce(np.asarray([index for _, index in batch]))
            waiting.append(batch)
            if len(waiting) > self.ahead:
                yield waiting.popleft()


def heed_parent_only(worker: int) -> None:
    """Worker function of loaders: SIGTERM ends them where the parent sent it.

    Schedulers send it to every process, and the parent still needs batches until its checkpoint.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def as_it_is(batch: Any) -> Any:
    """Collate function for data sets that give whole batches: there is nothing left to collate."""
    return batch
