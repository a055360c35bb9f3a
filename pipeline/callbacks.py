"""What a person at the terminal wants to know of a training run."""

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
"""Lightning's names of ours."""


class SamePrecision(L.Callback):
    """Says in one line what a precision costs that the device emulates; holds all processes of a run to one."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises RunError where precision=auto is one thing for one process and another for the others."""
        first = trainer.strategy.broadcast(self.precision)
        if trainer.strategy.reduce_boolean_decision(first != self.precision, all=False):
            raise RunError(
                "precision=auto is 32 on some of these machines and bf16 on others; set it to one of these for all"
            )
        if trainer.is_global_zero and (costs := slowness(self.precision, trainer.strategy.root_device)):
            print(f"precision={self.precision}: {costs}", flush=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run goes on in the precision that it began with."""
        checkpoint["precision"] = self.precision

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises RunError for a checkpoint of another precision: somebody has moved it here."""
        found = checkpoint.get("precision", self.precision)  # older versions had it in config.yaml alone
        if found != self.precision:
            raise RunError(f"the checkpoint is of a training in precision {found}, this one is in {self.precision}")


class Throughput(L.Callback):
    """Logs samples per second and the share of time spent waiting for data; tells the projected finish once."""

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
        # validation is neither training nor waiting
        self._ended = self._window_start = time.perf_counter()
        self._waited, self._samples = 0.0, 0


class SamplePictures(L.Callback):
    """Puts a picture of new samples into TensorBoard after each validation: the same prompts, the same seeds."""

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
    """One bar over the whole training: its length is the number of steps, for the loader is endless."""

    def __init__(self, max_batches: int) -> None:
        super().__init__(refresh_rate=10)
        self.max_batches = max_batches

    @property
    def total_train_batches(self) -> int:
        """Micro-batches of the whole training."""
        return self.max_batches

    def init_validation_tqdm(self) -> Any:
        """Validations are short: no bar of their own."""
        bar = super().init_validation_tqdm()
        bar.disable = True
        return bar

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Without the version number that Lightning adds."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items  # type: ignore[return-value]
