"""``python -m tests.reliability.table``: run the matrix of faults and write ``docs/reliability.md`` from its results.

The page's second part is of ``tests/reliability/defects.py`` and stays as it is.

A row is a test function: the first line of its docstring says how the fault is injected and what survives it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# Reliability

Written by `python -m tests.reliability.table`, which runs the tests in `tests/reliability/`; do not edit it.

Each fault is injected for real, and each case ends in success, or in exit code 2 and one line that says what to do:
no traceback, no hang, no process left behind, no wrong result. SIGTERM ends a command with exit code 75 (EX_TEMPFAIL):
the same command, called again, goes on to the bits of a run that nothing disturbed. Schedulers can requeue on it: SLURM
by `RequeueExit=75` and `--requeue`, with `--signal=TERM@120` for time enough; Kubernetes by a `podFailurePolicy` that
ignores it; systemd by `RestartForceExitStatus=75`.

| fault and outcome | test | cases | passed |
|---|---|---:|---:|
"""
DEFECTS = "\n## Deliberate defects\n"
"""Where the second part of the page begins."""


class Results:
    """What pytest collects and how it ends."""

    def __init__(self) -> None:
        self.items: list[pytest.Function] = []
        self.passed: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """All cases, of functions with a docstring."""
        self.items = items

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what passed."""
        if report.when == "call" and report.passed:
            self.passed[report.nodeid.partition("[")[0]] += 1


def matrix(*options: str) -> tuple[Results, int]:
    """The tests of this folder after a call of pytest, and its exit code."""
    results = Results()
    given = [
        "-q",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *options,
        f"--ignore={FOLDER}/test_table.py",
        str(FOLDER),
    ]
    code = pytest.main(given, plugins=[results])
    return results, int(code)


def rows(results: Results) -> list[tuple[str, str, int]]:
    """(fault, test, cases) of each test function, in their order."""
    cases = Counter(item.nodeid.partition("[")[0] for item in results.items)
    says = {item.nodeid.partition("[")[0]: (item.function.__doc__ or "").splitlines()[0] for item in results.items}
    return [(says[name], name.rpartition("/")[2], count) for name, count in cases.items()]


def page(results: Results) -> str:
    """The first part of the page."""
    passed = {name.rpartition("/")[2]: count for name, count in results.passed.items()}
    lines = [
        f"| {says} | `{name.replace('.py::', ': ')}` | {count} | {passed.get(name, 0)} |"
        for says, name, count in rows(results)
    ]
    total = f"| all | | {len(results.items)} | {sum(passed.values())} |"
    return HEAD + "\n".join([*lines, total]) + "\n"


if __name__ == "__main__":
    found, code = matrix()
    second = PAGE.read_text(encoding="utf-8").partition(DEFECTS)[1:]
    PAGE.write_text(page(found) + "".join(second), encoding="utf-8")
    sys.exit(code)
