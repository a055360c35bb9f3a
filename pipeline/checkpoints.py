"""Checkpoints of a training run: written atomically; the newest two are kept, damaged ones are skipped.

Notes:

- A checkpoint is written after an update, never inside one: partial gradients exist on every rank and are not stored.
- SIGTERM on any rank stops all ranks after the same update, with a checkpoint.
- Lightning writes its own checkpoint file in the system's temporary folder and, if that is on another file system,
  copies it to its final name. If it is killed while copying, an incomplete file has the final name.
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
    """Writes checkpoints atomically: a file has its final name only when it is complete and synced."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to a temporary file in the same folder and rename it. Raises OSError and then leaves no file."""
        buffer = io.BytesIO()  # torch hides an OSError from writing a file behind its own errors
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getbuffer())


class Checkpoints(L.Callback):
    """Saves every ``every`` updates, and on SIGTERM, after which it raises Preempted on all ranks."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self._progress: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Handle SIGTERM by saving from now on."""
        defer_sigterm()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if an update has ended and a checkpoint is due."""
        if pl_module.batches_seen % pl_module.config.accumulate_batches:
            return
        self._progress = deepcopy(trainer.fit_loop.state_dict())
        if pl_module.step % self.every == 0:
            self._save(trainer)
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Check for SIGTERM, because a validation can be longer than the grace period of a scheduler."""
        self._stop_if_asked(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the loop state after the last update: during a validation, the current state is different."""
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
    """The newest intact checkpoint in ``folder``; None if there are no checkpoints.

    Newer ones that are damaged are reported and renamed. Raises RunError if all are damaged, because only the user can
    decide to start again.
    """
    checkpoints = sorted(folder.glob(PATTERN), reverse=True)
    intact = next((path for path in checkpoints if is_whole(path)), None)
    if checkpoints and intact is None:
        raise RunError(f"no checkpoint in {folder} can be read; delete that folder to restart this stage")
    if is_first_process():
        for path in checkpoints[: checkpoints.index(intact)] if intact else ():
            renamed = path.rename(path.with_suffix(".damaged"))
            print(f"{path} is damaged (renamed to {renamed.name}); the one before it is used", flush=True)
    return intact


def is_whole(path: Path) -> bool:
    """True if all records of a checkpoint match their checksums, which ``torch.load`` does not verify."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError):
        return False
