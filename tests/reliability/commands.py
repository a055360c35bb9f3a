"""Commands in processes of their own, forked from one that has imported everything: a fault costs no import."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from itertools import count
from pathlib import Path

from tests.waiting import PATIENCE, free_port, wait_until

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.reliability.prepared"])
Setup = Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    said: str
    """Its stdout and stderr."""

    def refused(self, *words: str) -> bool:
        """True where it ended with code 2 and one line for the user, which has all ``words``."""
        lines = self.lines
        return self.code == 2 and len(lines) == 1 and all(re.search(word, lines[0]) for word in words)

    @property
    def lines(self) -> list[str]:
        """What it said to the user on stderr."""
        assert "Traceback" not in self.said, self.said
        return [line for line in self.said.splitlines() if line.startswith("octaves: ")]


class Started:
    """A command in a process of its own."""

    def __init__(self, log: Path, arguments: list[str], setup: Setup | None, environment: dict[str, str]) -> None:
        self.log = log
        self.process = CONTEXT.Process(target=_run, args=(log, arguments, setup, environment))
        self.process.start()

    def wait(self) -> Ended:
        """Wait for its end; fails the test where it hangs."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"hangs for {PATIENCE} s: {self.log.read_text()}")
        return Ended(self.process.exitcode, self.log.read_text(errors="replace") if self.log.exists() else "")


def start(folder: Path, *arguments: object, setup: Setup | None = None, **environment: str) -> Started:
    """Start ``octaves <arguments>``, after ``setup`` in the same process."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
    log.touch()
    return Started(log, [str(argument) for argument in arguments], setup, environment)


def octaves(folder: Path, *arguments: object, setup: Setup | None = None) -> Ended:
    """Run a command to its end."""
    return start(folder, *arguments, setup=setup).wait()


def start_two(folder: Path, *arguments: object, setups: tuple[Setup | None, Setup | None]) -> list[Started]:
    """Start a command on two ranks, as a launcher does."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [
        start(folder, *arguments, "trainer.devices=2", setup=setup, **place, LOCAL_RANK=str(rank))
        for rank, setup in enumerate(setups)
    ]


def two(folder: Path, *arguments: object, setups: tuple[Setup | None, Setup | None] = (None, None)) -> list[Ended]:
    """Run a command on two ranks to the end of both."""
    return [rank.wait() for rank in start_two(folder, *arguments, setups=setups)]


def nobody_left(group: int) -> bool:
    """True when no process of a process group lives any more. Fails the test where one goes on."""
    wait_until(lambda: not _living(group), f"the processes {_living(group)} to end")
    return True


def _living(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def signal_at(number: int, where: str, call: int) -> Setup:
    """A setup that sends the process a signal at a call of a function, ``module:name`` or ``module:class.name``."""
    return partial(patch, where, call, partial(_send, number))


def kill_at(where: str, call: int) -> Setup:
    """A setup that kills the process at a call of a function."""
    return signal_at(signal.SIGKILL, where, call)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


def patch(where: str, call: int, action: Callable[[], object]) -> None:
    """A setup: ``action`` happens before a call of a function."""

    def acting(original, calls, *args, **kwargs):
        if calls == call:
            action()
        return original(*args, **kwargs)

    wrap(where, acting)


def wrap(where: str, around: Callable[..., object]) -> None:
    """A setup: a function is called as ``around(function, number of the call, *its arguments)``."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    owner = import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), count(1)

    @wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, next(calls), *args, **kwargs)

    setattr(owner, name, wrapped)


def _run(log: Path, arguments: list[str], setup: Setup | None, environment: dict[str, str]) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.pop("OCTAVES_FIRST_PROCESS", None)  # commands that pytest ran itself
    os.environ.update(environment)
    import torch

    multiprocessing.set_start_method("fork", force=True)  # as in a process of the command line
    from pipeline.__main__ import main

    torch.set_num_threads(1)
    then = setup() if setup is not None else None
    faulthandler.dump_traceback_later(PATIENCE - 5)  # where it hangs; its thread may not be there before a namespace
    code = main(arguments)
    if callable(then):
        then()
    sys.exit(code)
