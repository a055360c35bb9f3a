"""Time training steps of several arms alternately: real trainers on real data, after some warm-up steps."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from pipeline.bench.figures import Figure
from pipeline.bench.place import Place
from pipeline.placement import wait_for
from pipeline.train import fit

WARM, TIMED = 4, 12
"""Steps of a run: warm-up steps, timed steps."""


class StepTimes(L.Callback):
    """Records when the steps of a run begin and end."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.begins.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        wait_for(pl_module.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds per timed micro-batch, including the wait for its data."""
        return (self.ends[-1] - self.ends[WARM - 1]) / (len(self.ends) - WARM)

    @property
    def wait_share(self) -> float:
        """Fraction of that time in which a step waited for its data."""
        waits = [begin - end for begin, end in zip(self.begins[WARM:], self.ends[WARM - 1 :], strict=False)]
        return sum(waits) / (self.ends[-1] - self.ends[WARM - 1])


def compare_steps(
    part: str,
    trainings: Mapping[str, Any],
    prepared: Callable[[Any], tuple[Any, L.LightningDataModule]],
    place: Place,
    amount: float,
    unit: str,
) -> list[Figure]:
    """``amount`` times samples per second for each arm, compared with the first arm; and the last arm's wait for data.

    ``prepared`` builds (module, data) from the training section of an arm. Arms are trained from scratch in each
    repeat.
    """
    names = list(trainings)
    runs: dict[str, list[StepTimes]] = {name: [] for name in names}
    for repeat in range(place.repeats):
        for name in names:
            times = StepTimes()
            training = dataclasses.replace(
                trainings[name],
                max_steps=WARM + TIMED,
                accumulate_batches=1,
                log_every=10**6,
                checkpoint_every=10**6,
                warmup_steps=1,
            )
            module, data = prepared(training)
            optimizers = 1 + (getattr(module, "discriminator", None) is not None)
            folder = place.folder / f"{part}-{names.index(name)}-{repeat}"
            fit(module, data, place.config.trainer, training, folder, optimizers, [times])
            runs[name].append(times)
    batch = trainings[names[0]].batch_size_per_device * amount
    first = [times.seconds for times in runs[names[0]]]
    figures = []
    for name in names:
        seconds = [times.seconds for times in runs[name]]
        ratio = statistics.median(b / a for a, b in zip(seconds, first, strict=True)) if name != names[0] else None
        spread = (batch / max(seconds), batch / min(seconds))
        against = "" if ratio is None else names[0]
        figures.append(Figure(part, name, batch / statistics.median(seconds), unit, spread, against, ratio))
    waits = [times.wait_share for times in runs[names[-1]]]
    spread = (min(waits), max(waits))
    share = statistics.median(waits)
    figures.append(Figure(part, f"waiting for data ({names[-1]})", share, "of the time", spread, goal=("<=", 0.02)))
    return figures
