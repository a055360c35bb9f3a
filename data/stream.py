"""Endless stream of training indices, as a batch sampler.

Notes:

- Epochs are concatenated and then cut into global batches. So no batch is short, a dataset may be smaller than a batch,
  and every rank takes the same number of steps.
- Batch k depends only on (length, batch size, world size, seed, k). A resumed run computes where to start and decodes
  nothing before that.
- The main process passes rank and world size, because a loader worker may not know them.
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
    """Epoch order that shuffles the samples of ``window`` shards together, then continues with the next shards.

    ``sizes`` are the samples per shard. The order of the shards changes with every epoch. Samples of one shard must not
    be more similar than samples of different shards. Raises ValueError for a window below 1.
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
            indices = np.concatenate([np.arange(self.borders[shard], self.borders[shard + 1]) for shard in members])
            order.append(generator.permutation(indices))
        return np.concatenate(order)


class IndexStream(Sampler[list[tuple[int, int]]]):
    """Endless lists of ``batch_size`` pairs (epoch, index) for one rank.

    The batches of all ranks, concatenated, equal the batches of a single process with ``batch_size * world_size``.
    Each epoch is a new permutation of ``range(length)``, drawn from (seed, epoch), or the result of
    ``order(seed, epoch)``.

    Raises ValueError for an empty dataset, a batch size below 1, a rank outside the world, or a negative start.
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
    """``IndexStream`` that sorts ``window`` global batches by length, so each batch holds samples of similar length.

    ``lengths`` [length] are the sample lengths. In one step all ranks get batches of similar length. Batch k still
    depends only on its number. Raises ValueError for a window below 1.
    """

    def __init__(self, lengths: np.ndarray, window: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(len(lengths), *args, **kwargs)
        if window < 1:
            raise ValueError(f"a window of {window} batches; allowed: 1 or more")
        self.lengths = lengths
        # a window that spans epochs would put copies of one sample into one batch, since they have the same length
        self.window = max(1, min(window, len(lengths) // (self.batch_size * self.world_size)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_window, skip = divmod(self.start_batch, self.window)
        global_batch_size = self.batch_size * self.world_size
        unsorted = iter(
            IndexStream(
                self.length, global_batch_size * self.window, seed=self.seed, start_batch=first_window, order=self.order
            )
        )
        for number, pairs in enumerate(unsorted, first_window):
            lengths = self.lengths[[index for _, index in pairs]]
            order = np.argsort(lengths, kind="stable").reshape(self.window, global_batch_size)
            shuffled = order[np.random.default_rng([self.seed, 1, number]).permutation(self.window)]
            for row in shuffled[skip:]:
                yield [pairs[place] for place in row[self.rank * self.batch_size :][: self.batch_size]]
            skip = 0


class LookAhead(Sampler[list[tuple[int, int]]]):
    """The batches of ``stream``. ``announce`` gets the indices of each batch ``ahead`` batches before it is yielded."""

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
    """Worker init function: the worker obeys SIGTERM only from its parent.

    Schedulers send SIGTERM to every process, but the parent needs batches until it has saved a checkpoint.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def as_it_is(batch: Any) -> Any:
    """Collate function for datasets that return whole batches."""
    return batch
