"""Stage 2 as a LightningModule: cross entropy on cached tokens, with random condition dropout for guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from data.layout import Tokens
from stages.contract import Prior, PriorOutput, Prompts
from stages.optimizers import build_optimizer, learning_rates
from stages.prior.config import PriorTrainingConfig
from stages.prior.sharding import shard
from stages.scales import scale_ids
from stages.training import (
    NamesSamples,
    build_average,
    build_schedule,
    check_finite,
    gradient_norm,
    seed_batch,
)

Batch = dict[str, Tensor]
NATS_PER_BIT = math.log(2)


class PriorModule(L.LightningModule):
    """Train ``prior`` on batches {ids [B, L, F], label [B], index [B]}.

    Captions add text and text_length; streams add length [B], header [B, S] and notes [B, L, P].
    """

    def __init__(self, prior: Prior, training: PriorTrainingConfig, seed: int) -> None:
        super().__init__()
        self.config = training
        self.seed = seed
        self.prior = prior
        self.average = build_average(prior, training.ema_decay)
        self.names: NamesSamples = lambda indices: [str(index) for index in indices]
        """Maps sample indices to names for error messages; the command sets it."""
        self.batches_seen = 0
        """Micro-batches that this process has trained on; the data stream resumes there."""
        # one metric for all scales together, then one per reported scale
        self.validation = torch.nn.ModuleList([MeanMetric() for _ in (0, *prior.layout.prefixes)])

    @property
    def quantity(self) -> str:
        """Name of the loss in logs; the loss of masked elements is not a rate, so it has its own name."""
        return "bits_per_token" if self.prior.likelihood else "masked_bits_per_token"

    @property
    def step(self) -> int:
        """Optimizer updates so far."""
        return self.batches_seen // self.config.accumulate_batches

    def configure_model(self) -> None:
        """Shard the weights and their average if the strategy has a device mesh."""
        if self.device_mesh is not None:
            for network in (self.prior, self.average.module):
                shard(network, self.device_mesh["data_parallel"])
            self.average.foreach = False  # foreach kernels do not support sharded tensors

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        optimizer = build_optimizer(self.prior, config)
        self.schedule = build_schedule(optimizer, config)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seed_batch(self.seed, self.global_rank, self.batches_seen)
        prompts = self.prior.condition.drop(Prompts.from_batch(batch))
        tokens = Tokens.from_batch(batch).prefix(self.prior.max_length)
        output = self.prior(tokens, prompts)
        judged = tokens.counted if output.judged is None else output.judged
        # average the count over all processes, so that the mean gradient is that of the joint batch
        count = self.trainer.strategy.reduce(judged.sum().float(), reduce_op="mean").clamp(min=1)
        nll = output.nll
        terms = {"nll": nll.sum() / (count * nll.shape[2])}
        if output.legal_nll is not None:
            terms["illegal"] = output.legal_nll.sum() / (count * nll.shape[2])
        check_finite(terms, self.step, batch["index"], self.names, self._any_process)
        self.batches_seen += 1
        bits_per_token = terms["nll"].detach() * nll.shape[2] / NATS_PER_BIT
        self.log(self.quantity, bits_per_token, prog_bar=True, logger=False)
        if self.batches_seen % (self.config.accumulate_batches * self.config.log_every) == 0 or self.batches_seen == 1:
            values = {
                f"{self.quantity}/{name}": value for name, value, _ in self._by_scale(nll.detach(), tokens, judged)
            }
            if output.illegal is not None:
                values["illegal_probability"] = output.illegal.sum() / count
                values["padding_share"] = 1 - tokens.counted.float().mean()
            self._log({f"train/{name}": value for name, value in values.items()})
        return torch.stack(list(terms.values())).sum()

    def _any_process(self, true_here: bool) -> bool:
        return bool(self.trainer.strategy.reduce_boolean_decision(true_here, all=False))

    def _by_scale(self, nll: Tensor, tokens: Tokens, counted: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, mean bits per element, elements) for all scales together and for each reported scale.

        ``counted`` [B, L] holds the weights of the elements.
        """
        counted = counted.float()
        bits = nll.sum(2) / NATS_PER_BIT * counted
        yield "all", bits.sum() / counted.sum().clamp(min=1), counted.sum()
        scales = scale_ids(tokens, self.prior.layout, self.prior.grammar)
        for number in self.prior.layout.prefixes:
            weights_here = counted * (scales == number - 1)
            name = self.prior.layout.scales[number - 1].name
            yield name, (bits * (scales == number - 1)).sum() / weights_here.sum().clamp(min=1), weights_here.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.trainer.global_step
        self.schedule.step_update(step)
        if (step + 1) % self.config.log_every == 0:
            self._log({"gradient_norm": gradient_norm(self.prior), **learning_rates(optimizer, "learning_rate")})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update(self.prior, step=self.trainer.global_step)

    def _log(self, values: dict[str, Tensor]) -> None:
        if self.trainer.is_global_zero and self.logger is not None:
            self.logger.log_metrics({name: float(value) for name, value in values.items()}, step=self.step)

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        prior = cast(Prior, self.average.module)
        tokens = Tokens.from_batch(batch).prefix(prior.max_length)
        output: PriorOutput = prior(tokens, Prompts.from_batch(batch))
        judged = tokens.counted if output.judged is None else output.judged
        bits_by_scale = self._by_scale(output.nll, tokens, judged * batch["weight"][:, None])
        for metric, (_, mean, elements) in zip(self.validation, bits_by_scale, strict=True):
            metric.update(mean, elements)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        layout = self.prior.layout
        names = ["all", *(layout.scales[number - 1].name for number in layout.prefixes)]
        values = {}
        for name, metric in zip(names, self.validation, strict=True):
            values[f"validation/{self.quantity}/{name}"] = metric.compute()  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
        if not self.trainer.sanity_checking:
            self._log(values)
            self.log("val_bits", values[f"validation/{self.quantity}/all"], prog_bar=True, logger=False)

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_seen = int(checkpoint["batches_seen"])
