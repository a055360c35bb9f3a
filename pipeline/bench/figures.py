"""What a benchmark says: a speed or size, what it stands beside, and the goal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stages.measures.ladder import time_interleaved


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    part: str
    """What was measured: transforms, tokenizer, training, cache, reader, prior, sampling."""
    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    """The lowest and highest of all runs; None for what does not vary."""
    against: str = ""
    """What ``ratio`` compares with, measured in turn with it in the same run."""
    ratio: float | None = None
    """``value`` over that of ``against``."""
    goal: tuple[str, float] | None = None
    """(">=" or "<=", bound) of the ratio, or of the value where there is no ratio."""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        found = self.value if self.ratio is None else self.ratio
        return found >= self.goal[1] if self.goal[0] == ">=" else found <= self.goal[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: value for key, value in {**asdict(self), "met": self.met}.items() if value not in (None, "")}


def speeds(
    part: str,
    tasks: Mapping[str, Callable[[], object]],
    amount: float,
    unit: str,
    repeats: int,
    against: Mapping[str, tuple[str, tuple[str, float] | None]] = {},
) -> list[Figure]:
    """How much of ``unit`` every task does in a second, each of which does ``amount`` a call.

    ``against`` names the task that another one is compared with, and the goal of the ratio.
    """
    seconds = dict(zip(tasks, time_interleaved(list(tasks.values()), repeats), strict=True))
    median = {name: amount / statistics.median(runs) for name, runs in seconds.items()}
    found = []
    for name, runs in seconds.items():
        other, goal = against.get(name, ("", None))
        # pairs of neighbours, so that a slow minute meets both
        ratio = statistics.median(b / a for a, b in zip(runs, seconds[other], strict=True)) if other else None
        spread = (amount / max(runs), amount / min(runs))
        found.append(Figure(part, name, median[name], unit, spread, other, ratio, goal))
    return found


def line_of(figure: Figure) -> str:
    """A line of the table: value, spread, ratio, goal."""
    line = f"{figure.part:11s}{figure.name:34s}{shortened(figure.value):>9s} {figure.unit:14s}"
    if figure.ratio is not None:
        line += f"{figure.ratio:7.2f} x {figure.against}"
    if figure.goal is not None:
        line += f"  (goal {figure.goal[0]} {figure.goal[1]:g}: {'met' if figure.met else 'missed'})"
    return line.rstrip()


def shortened(value: float) -> str:
    """Three or four digits, with k or M."""
    for bound, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e6 if letter == 'M' else 1e3):.4g}{letter}"
    return f"{value:.4g}"
