"""Callbacks that inform the user about a training run: precision, speed, sample images and progress."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torchvision.utils import make_grid

from data.layout import Tokens
from pipeline.errors import RunError
from stages.contract import Prompts, Tokenizer
from stages.precision import slowness
from stages.prior.sampling import SamplingConfig, sample

TRAINER_PRECISIONS: dict[str, Literal["32-true", "bf16-mixed"]] = {"32": "32-true", "bf16": "bf16-mixed"}
"""Names of the precisions in Lightning."""


class SamePrecision(L.Callback):
    """Makes all processes of a run use the same precision, and prints a warning if the device only emulates it."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises RunError if precision=auto is not the same on all processes."""
        first = trainer.strategy.broadcast(self.precision)
        if trainer.strategy.reduce_boolean_decision(first != self.precision, all=False):
            raise RunError(
                "precision=auto is 32 on some of these machines and bf16 on others; set it to one of these for all"
            )
        if trainer.is_global_zero and (costs := slowness(self.precision, trainer.strategy.root_device)):
            print(f"precision={self.precision}: {costs}", flush=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the precision: a run continues in the precision that it started with."""
        checkpoint["precision"] = self.precision

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises RunError for a checkpoint in another precision, i.e. one moved here from another run."""
        saved = checkpoint.get("precision", self.precision)  # older versions stored it only in config.yaml
        if saved != self.precision:
            raise RunError(f"the checkpoint is of a training in precision {saved}, this one is in {self.precision}")


class Throughput(L.Callback):
    """Logs samples per second and the fraction of time spent waiting for data; prints the expected end once."""

    def __init__(self, max_steps: int, log_every: int) -> None:
        self.max_steps, self.log_every = max_steps, log_every
        self._ended = self._started = self._window_start = 0.0
        self._waited, self._samples = 0.0, 0
        self._first_step, self._logged_step, self._projected = 0, 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._ended = self._window_start = self._started = time.perf_counter()
        self._first_step = pl_module.step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self._ended = time.perf_counter()
        self._samples += len(batch["index"]) * trainer.world_size
        step = pl_module.step
        if step % self.log_every == 0 and step != self._logged_step:
            self._logged_step = step
            span = now - self._window_start
            if trainer.logger is not None and trainer.is_global_zero:
                values = {"samples_per_second": self._samples / span, "data_wait_share": self._waited / span}
                trainer.logger.log_metrics({f"speed/{name}": value for name, value in values.items()}, step=step)
            self._window_start, self._waited, self._samples = now, 0.0, 0
        if not self._projected and step - self._first_step >= 50:
            self._projected = True
            left = (now - self._started) / (step - self._first_step) * (self.max_steps - step)
            finish = datetime.now() + timedelta(seconds=left)
            if trainer.is_global_zero:
                print(f"step {step}: about {timedelta(seconds=round(left))} left, done at {finish:%H:%M}", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # validation counts neither as training nor as waiting
        self._ended = self._window_start = time.perf_counter()
        self._waited, self._samples = 0.0, 0


class SamplePictures(L.Callback):
    """Logs images to TensorBoard after each validation, sampled with the same prompts and seeds each time."""

    def __init__(
        self, tokenizer: Tokenizer, settings: SamplingConfig, prompts: Prompts, prefix: Tokens | None = None
    ) -> None:
        self.tokenizer, self.settings, self.prompts, self.prefix = tokenizer, settings, prompts, prefix

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        writer = getattr(trainer.logger, "experiment", None)
        if writer is None or not trainer.is_global_zero or trainer.sanity_checking:
            return
        prompts = self.prompts.to(pl_module.device)
        prefix = None if self.prefix is None else self.prefix.to(pl_module.device)
        tokens = sample(pl_module.average.module, prompts, self.settings, range(len(prompts)), prefix)
        with torch.no_grad():
            images = self.tokenizer.to(pl_module.device).decode(tokens).float().cpu()
        writer.add_image("validation/samples", make_grid((images + 1) / 2, nrow=8), pl_module.step)


class StepProgressBar(TQDMProgressBar):
    """One progress bar for the whole training. Its length is the number of steps, because the loader is endless."""

    def __init__(self, max_batches: int) -> None:
        super().__init__(refresh_rate=10)
        self.max_batches = max_batches

    @property
    def total_train_batches(self) -> int:
        """Micro-batches of the whole training."""
        return self.max_batches

    def init_validation_tqdm(self) -> Any:
        """No bar for validation, which is short."""
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Metrics without the version number that Lightning adds."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items  # type: ignore[return-value]
