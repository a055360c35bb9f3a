"""Checkpoints of a training: whole or absent, the newest two kept, a damaged one passed over.

What is notable here:

- one is written after an update, never inside one: gradients of half an update live on every rank, and none is stored;
- SIGTERM on any rank makes all of them stop after the same update, with a checkpoint;
- Lightning's own checkpoint file is made in the system's temporary folder and, where that is another file system,
  copied to its final name: killed on the way, it leaves half a file under a whole one's name.
"""

from __future__ import annotations

import io
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from data.files import write_atomically
from pipeline.errors import RunError
from pipeline.processes import Preempted, defer_sigterm, is_first_process, sigterm_received

FOLDER = "checkpoints"
PATTERN = "step????????.ckpt"
KEPT = 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint has its name only when it is whole and synced."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write through a temporary name in the same folder. Raises OSError, and leaves no file then."""
        buffer = io.BytesIO()  # torch hides an OSError of a file behind errors of its own
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getbuffer())


class Checkpoints(L.Callback):
    """Saves every ``every`` updates and on SIGTERM, after which it raises Preempted on all ranks."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._progress: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """From here on there is something to save."""
        defer_sigterm()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where an update has ended and a checkpoint is due."""
        if pl_module.batches_seen % pl_module.config.accumulate_batches:
            return
        self._progress = deepcopy(trainer.fit_loop.state_dict())
        if pl_module.step % self.every == 0:
            self._save(trainer)
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """A validation can be longer than the time that a scheduler gives."""
        self._stop_if_asked(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Where the loops were after the last update: in a validation they are elsewhere."""
        checkpoint["loops"]["fit_loop"] = self._progress

    def _stop_if_asked(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(sigterm_received(), all=False):
            path = self._save(trainer)
            raise Preempted(f"SIGTERM: saved {path}, step {pl_module.step}")

    def _save(self, trainer: L.Trainer) -> Path:
        path = self.folder / f"step{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(PATTERN))[:-KEPT]:
                old.unlink()
        return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None where there is none yet.

    Newer ones that are damaged are named and set aside. Raises RunError where no checkpoint is whole: to begin again is
    for the user to decide.
    """
    saved = sorted(folder.glob(PATTERN), reverse=True)
    whole = next((path for path in saved if is_whole(path)), None)
    if saved and whole is None:
        raise RunError(f"no checkpoint in {folder} can be read; delete that folder to begin this stage again")
    if is_first_process():
        for path in saved[: saved.index(whole)] if whole else ():
            aside = path.rename(path.with_suffix(".damaged"))
            print(f"{path} is damaged (now {aside.name}); the one before it is used", flush=True)
    return whole


def is_whole(path: Path) -> bool:
    """True where every record of a checkpoint has its checksum, which ``torch.load`` does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError):
        return False
