"""Benchmark results: a speed or size, what it is compared with, and its goal."""

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
    """Part that was measured: transforms, tokenizer, training, cache, reader, prior, sampling."""
    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    """Lowest and highest value of all runs; None for values that do not vary."""
    against: str = ""
    """What ``ratio`` compares with, measured alternately in the same run."""
    ratio: float | None = None
    """``value`` divided by the value of ``against``."""
    goal: tuple[str, float] | None = None
    """(">=" or "<=", bound) for the ratio, or for the value if there is no ratio."""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        compared = self.value if self.ratio is None else self.ratio
        return compared >= self.goal[1] if self.goal[0] == ">=" else compared <= self.goal[1]

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
    """Measure how much of ``unit`` each task does per second, if one call does ``amount``.

    ``against`` maps a task to the task it is compared with, and the goal of the ratio.
    """
    seconds = dict(zip(tasks, time_interleaved(list(tasks.values()), repeats), strict=True))
    median = {name: amount / statistics.median(runs) for name, runs in seconds.items()}
    figures = []
    for name, runs in seconds.items():
        other, goal = against.get(name, ("", None))
        # ratio of consecutive runs, because a temporary slowdown affects both
        ratio = statistics.median(b / a for a, b in zip(runs, seconds[other], strict=True)) if other else None
        spread = (amount / max(runs), amount / min(runs))
        figures.append(Figure(part, name, median[name], unit, spread, other, ratio, goal))
    return figures


def line_of(figure: Figure) -> str:
    """A line of the table: value, ratio, goal."""
    line = f"{figure.part:11s}{figure.name:34s}{shortened(figure.value):>9s} {figure.unit:14s}"
    if figure.ratio is not None:
        line += f"{figure.ratio:7.2f} x {figure.against}"
    if figure.goal is not None:
        line += f"  (goal {figure.goal[0]} {figure.goal[1]:g}: {'met' if figure.met else 'missed'})"
    return line.rstrip()


def shortened(value: float) -> str:
    """Format with at most four digits, and k or M for large numbers."""
    for bound, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e6 if letter == 'M' else 1e3):.4g}{letter}"
    return f"{value:.4g}"
