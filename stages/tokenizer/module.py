"""Stage 1 as a LightningModule: reconstruction, perceptual, adversarial and codebook losses.

One update (manual optimization) has these steps:

1. Forward pass of the tokenizer. The discriminator is frozen in the losses of the generator.
2. Loss of the discriminator on the same images and the detached reconstruction, with its regularizers on the same
   logits: R1 at every n-th update, and LeCam with the running means of the previous update.
3. **One** backward pass of the sum. Every parameter gets only its own loss and is used once, and DDP reduces once.
4. Clip gradients and step both optimizers, then update the moving average of the tokenizer and LeCam's running means.

The discriminator trains from step 0. The adversarial loss of the generator starts later, with a linear ramp.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric

from data.layout import Tokens
from stages.contract import Tokenizer
from stages.measures.codes import code_use
from stages.measures.perceptual import build_perceptual
from stages.optimizers import build_adamw, build_optimizer, learning_rates
from stages.tokenizer.config import TokenizerTrainingConfig
from stages.tokenizer.discriminator import LOSSES, LeCam, build_discriminator, gradient_penalty
from stages.tokenizer.quantizers import Quantizer
from stages.training import (
    NamesSamples,
    build_average,
    build_schedule,
    check_finite,
    gradient_norm,
    seed_batch,
)

Batch = dict[str, Tensor]


class TokenizerModule(L.LightningModule):
    """Trains ``tokenizer`` on batches {pixels [B, C, H, W] in [-1, 1], index [B]}."""

    def __init__(self, tokenizer: Tokenizer, training: TokenizerTrainingConfig, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.automatic_optimization = False
        self.config = training
        self.tokenizer = tokenizer
        self.average = build_average(tokenizer, training.ema_decay)
        self.discriminator = (
            build_discriminator(training, tokenizer.channels, tokenizer.layout.image_size)
            if training.adversarial_weight > 0
            else None
        )
        self.lecam = LeCam() if self.discriminator is not None and training.lecam_weight > 0 else None
        self.perceptual = build_perceptual(training.perceptual)
        self.names: NamesSamples = lambda indices: [str(index) for index in indices]
        """Returns names of samples for error messages; set by the command, which knows the image source."""
        self.batches_seen = 0
        """Micro-batches that this process has trained on; the data stream resumes there."""
        self.recent_ids: list[Tensor] = []
        self.recent_logits: list[Tensor] = []
        """Mean logits (real, fake) of each micro-batch of this update, for LeCam."""
        self.latest_penalty: dict[str, Tensor] = {}
        """Logged values of the last update with R1, repeated in log entries of updates without R1."""
        self.validation_ids: list[Tensor] = []
        self.validation = torch.nn.ModuleDict({name: MeanMetric() for name in ("mse", "psnr", "perceptual")})

    @property
    def step(self) -> int:
        """Generator updates so far. Lightning's global_step also counts discriminator updates."""
        return self.batches_seen // self.config.accumulate_batches

    # ------------------------------------------------------------------ losses

    def adversarial_ramp(self) -> float:
        """Factor on the adversarial weight at this step: 0 before the start, then rising linearly to 1."""
        steps_since_start = self.step - self.config.adversarial_start
        return min(1.0, max(0.0, (steps_since_start + 1) / max(1, self.config.adversarial_ramp_steps)))

    def loss_terms(
        self, pixels: Tensor, large: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """(weighted terms of the total loss, additional logs, ids) for pixels [B, C, H, W].

        ``large`` are the same images at a multiple of the size, for a head.
        """
        config = self.config
        output = self.tokenizer(pixels, large)
        reconstruction = output.reconstruction.float()
        if output.target is not None:
            # also for the discriminator, which could otherwise recognize a target by its missing details
            pixels = output.target
        raw = {"pixel": functional.mse_loss(reconstruction, pixels), **output.losses}
        weights = {
            "pixel": config.pixel_weight,
            "commitment": config.commitment_weight,
            "codebook": config.codebook_weight,
            "entropy": config.entropy_weight,
            "head": config.head_weight,
        }
        if self.perceptual is not None:
            raw["perceptual"] = self.perceptual(reconstruction, pixels).mean()
            weights["perceptual"] = config.perceptual_weight
        logs: dict[str, Tensor] = {}
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            raw["adversarial"] = LOSSES[config.adversarial_loss][1](self.discriminator(reconstruction)[0])
            weights["adversarial"] = config.adversarial_weight * self.adversarial_ramp()
            self.discriminator.requires_grad_(True)
            discriminator_raw, discriminator_weights, logs = self._discriminator_terms(pixels, reconstruction.detach())
            raw |= discriminator_raw
            weights |= discriminator_weights
        logs |= {f"loss/{name}": value.detach() for name, value in raw.items()}
        terms = {name: value * weights[name] for name, value in raw.items()}
        logs |= {f"weighted/{name}": value.detach() for name, value in terms.items()}
        if "r1" in terms:
            self.latest_penalty = {name: logs[name] for name in ("loss/r1", "weighted/r1")}
        return terms, logs | self.latest_penalty, output.ids.detach()

    def _discriminator_terms(
        self, pixels: Tensor, reconstruction: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
        """(loss terms of the discriminator, their weights, additional logs) from one pass over real and fake images."""
        config = self.config
        assert self.discriminator is not None
        apply_r1 = config.r1_weight > 0 and self.step % config.r1_every == 0
        pixels = pixels.detach().requires_grad_(apply_r1)
        # second derivatives need float32, so with R1 the whole pass runs without autocast
        with torch.autocast(pixels.device.type, enabled=False) if apply_r1 else nullcontext():
            real, fake = self.discriminator(pixels, reconstruction)
            raw = {"discriminator": LOSSES[config.adversarial_loss][0](real, fake)}
            weights = {"discriminator": 1.0}
            if apply_r1:
                raw["r1"] = gradient_penalty(real, pixels)
                weights["r1"] = config.r1_weight / 2 * config.r1_every
        if self.lecam is not None:
            raw["lecam"] = self.lecam(real, fake)
            weights["lecam"] = config.lecam_weight
        return raw, weights, {"logits/real": real.detach().float().mean(), "logits/fake": fake.detach().float().mean()}

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        optimizers = [build_optimizer(self.tokenizer, config)]
        if self.discriminator is not None:
            optimizers.append(build_adamw(self.discriminator, config.discriminator_learning_rate, (0.5, 0.9), 0.0))
        self.schedules = [build_schedule(optimizer, config) for optimizer in optimizers]
        return optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        config = self.config
        seed_batch(self.seed, self.global_rank, self.batches_seen)
        is_last_batch = (self.batches_seen + 1) % config.accumulate_batches == 0
        step = self.step
        with self._sync_gradients(is_last_batch):
            pixels, large = batch["pixels"], None
            if config.oversampling > 1:
                large = pixels
                size = self.tokenizer.layout.image_size
                pixels = functional.interpolate(large, size, mode="bicubic", antialias=True).clamp(-1, 1)
            terms, logs, ids = self.loss_terms(pixels, large)
            check_finite(terms, step, batch["index"], self.names, self._any_process)
            self.manual_backward(torch.stack(list(terms.values())).sum() / config.accumulate_batches)
        self.recent_ids.append(ids)
        if self.lecam is not None:
            self.recent_logits.append(torch.stack([logs["logits/real"], logs["logits/fake"]]))
        if is_last_batch:
            self._update(step, logs)
        self.batches_seen += 1
        self.log("psnr", -10 * torch.log10(logs["loss/pixel"] / 4), prog_bar=True, logger=False)
        if is_last_batch and ((step + 1) % config.log_every == 0 or step == 0):
            self._log(logs | self._code_use("codes", self.recent_ids), step)

    def _any_process(self, true_here: bool) -> bool:
        return bool(self.trainer.strategy.reduce_boolean_decision(true_here, all=False))

    def _update(self, step: int, logs: dict[str, Tensor]) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        networks = [self.tokenizer, self.discriminator][: len(optimizers)]
        names = ("generator", "discriminator")
        for name, optimizer, network, schedule in zip(names, optimizers, networks, self.schedules, strict=False):
            optimizer = cast(LightningOptimizer, optimizer)
            schedule.step_update(step)
            logs[f"gradient_norm/{name}"] = gradient_norm(cast(torch.nn.Module, network))
            self.clip_gradients(optimizer.optimizer, self.config.gradient_clip_norm, "norm")
            optimizer.step()
            optimizer.zero_grad()
            logs |= learning_rates(optimizer.optimizer, f"learning_rate/{name}")
        self.average.update(self.tokenizer, step=step + 1)
        for trained, averaged in zip(self.tokenizer.modules(), self.average.module.modules(), strict=True):
            if isinstance(trained, Quantizer):
                trained.copy_revived(cast(Quantizer, averaged))
        if self.lecam is not None:
            means = torch.stack(self.recent_logits).mean(0)
            self.recent_logits.clear()
            self.lecam.update(*self.trainer.strategy.reduce(means, reduce_op="mean"))

    def _sync_gradients(self, is_last_batch: bool) -> AbstractContextManager[Any]:
        """Context that reduces gradients over ranks only at the last micro-batch of an update."""
        if is_last_batch or not isinstance(self.trainer.strategy, ParallelStrategy):
            return nullcontext()
        return self.trainer.strategy.block_backward_sync()

    def _code_use(self, prefix: str, ids: list[Tensor]) -> dict[str, Tensor]:
        """Usage and perplexity of each reported scale from this rank's ids [n, L, F]. Clears ``ids``."""
        values: dict[str, Tensor] = {}
        for use in code_use(Tokens.fixed(torch.cat(ids)), self.tokenizer.layout, self.tokenizer.layout.prefixes):
            name = f"{use.scale}/{use.field}" if self.tokenizer.layout.num_fields > 1 else use.scale
            values[f"{prefix}/usage/{name}"] = torch.tensor(use.share)
            values[f"{prefix}/perplexity/{name}"] = torch.tensor(use.perplexity)
        ids.clear()
        return values

    def _log(self, values: dict[str, Tensor], step: int) -> None:
        if self.trainer.is_global_zero and self.logger is not None:
            self.logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pixels, weight = batch["pixels"], batch["weight"]
        tokenizer = cast(Tokenizer, self.average.module)
        tokens = tokenizer.encode(pixels)
        reconstruction = tokenizer.decode(tokens).float()
        error = (reconstruction - pixels).square().mean((1, 2, 3))
        self.validation["mse"].update(error, weight)  # type: ignore[operator]
        self.validation["psnr"].update(-10 * torch.log10(error.clamp_min(1e-10) / 4), weight)  # type: ignore[operator]
        if self.perceptual is not None:
            self.validation["perceptual"].update(self.perceptual(reconstruction, pixels), weight)  # type: ignore[operator]
        self.validation_ids.append(tokens.ids[weight > 0])
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._show(tokenizer, pixels[:8], tokens.to(pixels.device))

    def on_validation_epoch_end(self) -> None:
        values = {}
        for name, metric in self.validation.items():
            if self.perceptual is not None or name != "perceptual":
                values[f"validation/{name}"] = metric.compute()  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
        values |= self._code_use("validation/codes", self.validation_ids)
        if not self.trainer.sanity_checking:
            self._log(values, self.step)
            self.log("val_psnr", values["validation/psnr"], prog_bar=True, logger=False)

    def _show(self, tokenizer: Tokenizer, pixels: Tensor, tokens: Tokens) -> None:
        """Log originals and the decoded prefixes, coarse to fine (only the full decode for a dense decoder)."""
        writer = getattr(self.logger, "experiment", None)
        if writer is None:
            return
        layout = tokenizer.layout
        shown = Tokens(tokens.ids[: len(pixels)], tokens.lengths[: len(pixels)], tokens.header[: len(pixels)])
        lengths = [layout.prefix_length(k) for k in layout.prefixes] if layout.decodes_prefixes else [layout.length]
        decoded = [tokenizer.decode(shown.prefix(length)).float() for length in lengths]
        rows = [pixels, *(functional.interpolate(images, pixels.shape[-2:]) for images in decoded)]
        picture = torch.cat([torch.cat(list(images), dim=-1) for images in rows], dim=-2)
        writer.add_image("validation/originals_and_prefixes", (picture.cpu() + 1) / 2, self.step)

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_seen = int(checkpoint["batches_seen"])
