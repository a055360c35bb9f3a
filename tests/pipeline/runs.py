"""Runs of the tiny config in folders of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.__main__ import main
from tests.conftest import TINY


def write_tiny(folder: Path, images: Path) -> None:
    """Put the tiny config over ``images`` into ``folder``."""
    (folder / "tiny.yaml").write_text(TINY.format(path=images))


def caller(folder: Path, *keys: str) -> Callable[..., int]:
    """``call(command, *more keys)``: the exit code of a command for the tiny config of ``folder`` and its ``run``."""

    def call(command: str, *more: str) -> int:
        return main([command, str(folder / "tiny.yaml"), f"run={folder}/run", *keys, *more])

    return call


def train_all(call: Callable[..., int], *keys: str) -> None:
    """Both stages and the cache between them."""
    for command in ("train-tokenizer", "cache-tokens", "train-prior"):
        assert call(command, *keys) == 0


def stop_after_two(module: Any, *_: Any) -> None:
    """Ctrl-C in the third update, for ``PriorModule.on_train_batch_end``: a checkpoint of the second one is there."""
    if module.batches_seen == 3:
        raise KeyboardInterrupt
