"""Which cases of a test belong to the fast suite: one of each kind; the others are slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_are(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Parameters of a test, values or tuples of them: the ``cases``, those marked slow that are not ``fast``.

    Raises ValueError where one of ``fast`` is no case.
    """
    cases = list(cases)
    if foreign := [case for case in fast if case not in cases]:
        raise ValueError(f"{foreign} are no cases")
    together = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*values, marks=() if case in fast else pytest.mark.slow)
        for case, values in zip(cases, together, strict=True)
    ]
