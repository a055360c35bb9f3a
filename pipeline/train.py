"""train-tokenizer and train-prior: load data, build models, train, save."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from data.errors import InputError
from data.images.module import ImageDataModule
from data.images.reading import read_eval
from data.images.source import ImageSource
from data.images.sources import open_source
from data.images.views import smaller_side, to_float
from data.remote import is_remote
from data.tokens.manifest import check_belongs
from data.tokens.module import TokenDataModule, to_tensors, widened
from data.tokens.reader import TokenReader
from data.tokens.streamed import StreamedReader
from pipeline.callbacks import TRAINER_PRECISIONS, SamePrecision, SamplePictures, StepProgressBar, Throughput
from pipeline.checkpoints import FOLDER, AtomicCheckpointIO, Checkpoints, newest_checkpoint
from pipeline.config import Config, TrainerConfig, check_command
from pipeline.cores import use_threads
from pipeline.errors import RunError
from pipeline.placement import image_loaders, placement, processes_here, token_loaders
from pipeline.processes import is_first_process
from pipeline.ranks import ending_together
from pipeline.run import need, stage_folder
from stages.conditions.text import TextCondition
from stages.contract import Prior, Prompts, RefusedImage, Tokenizer
from stages.factory import build_grammar, build_prior, build_tokenizer, condition_class
from stages.grammar import PlacedGrammar
from stages.prior.config import PriorTrainingConfig
from stages.prior.module import PriorModule
from stages.prior.sampling import check_sampling
from stages.prior.sharding import whole_state
from stages.tokenizer.config import TokenizerTrainingConfig
from stages.tokenizer.module import TokenizerModule
from stages.training import trainer_steps
from stages.weights import load_tokenizer, save_prior, save_tokenizer, take_over, tokens_sha256


def train_tokenizer(config: Config) -> Path:
    """Train stage 1 (a codec is only fitted) and write its averaged weights. Returns the file.

    Raises ConfigError for trainer settings that only other commands support.
    """
    check_command("train-tokenizer", config)
    path = Path(config.tokenizer.path)
    with stage_folder(path.parent, config, "tokenizer") as config:
        if path.exists():
            print(f"{path} is finished; choose another RUN= to train again")
            return path
        use_threads(processes_here(config.trainer))
        training = config.tokenizer_training
        size = (config.images.size, config.images.size)
        L.seed_everything(config.seed, verbose=False)
        tokenizer = build_tokenizer(config.tokenizer, size, config.images.channels)
        images = ImageDataModule(
            dataclasses.replace(config.images, skip_corrupt=True),  # validation in training skips broken files
            training.batch_size_per_device,
            image_loaders(config),
            config.seed,
            validation_images=training.validation_images,
            oversampling=training.oversampling,
        )
        source_metadata: dict[str, Any] = {}
        if training.start_from is None:
            fit_statistics(config, tokenizer)
        else:
            source_metadata = take_over(tokenizer, config.tokenizer, training.start_from)
        if training.oversampling > 1:
            check_large(images.source("train"), config.images.size * training.oversampling)
        if tokenizer.trainable:
            module = TokenizerModule(tokenizer, training, config.seed)
            module.names = lambda indices: [images.source("train").key(index) for index in indices]
            trainer = fit(module, images, config.trainer, training, path.parent, 1 + (module.discriminator is not None))
            tokenizer = module.average.module
            perceptual = training.perceptual if training.perceptual_weight > 0 else "none"
            extra = {"steps": module.step, "world_size": trainer.world_size, "perceptual": perceptual}
            extra["precision"] = training.precision
        else:
            extra = {"steps": 0, "world_size": 1, "perceptual": "none"}
        if is_first_process():
            save_tokenizer(path, tokenizer, config.tokenizer, extra | source_metadata)
            print(f"wrote {path}")
    return path


def fit_statistics(config: Config, tokenizer: Tokenizer) -> None:
    """Fit the data statistics of a tokenizer on training images. Raises InputError for an image that it rejects."""
    keys: list[str] = []
    try:
        tokenizer.fit(first_images(config, config.tokenizer_training.fit_images, keys))
    except RefusedImage as refused:
        raise InputError(f"the train image {keys[refused.row]}: {refused.reason}") from refused


def check_large(source: ImageSource, side: int, count: int = 16) -> None:
    """Raise RunError if most of ``count`` training images are smaller than ``side``: they would teach nothing."""
    indices = range(0, len(source), max(1, len(source) // count))[:count]
    small = [index for index in indices if smaller_side(source[index].image) < side]
    if 2 * len(small) > len(indices):
        raise RunError(
            f"the training images are smaller than images.size times tokenizer_training.oversampling, {side} px; give "
            "larger ones (for photos: octaves photos size=..., then images.path=photos...), or a smaller oversampling"
        )


def train_prior(config: Config) -> Path:
    """Train stage 2 on the token cache and write its averaged weights. Returns the file."""
    if not is_remote(config.tokens.path):
        need(Path(config.tokens.path) / "manifest.json", "token cache", "cache-tokens", config)
    path = Path(config.prior.path)
    with stage_folder(path.parent, config, "prior") as config:
        if path.exists():
            print(f"{path} is finished; choose another RUN= to train again")
            return path
        use_threads(processes_here(config.trainer))
        training = config.prior_training
        tokens = TokenDataModule(
            config.tokens.path,
            training.batch_size_per_device,
            token_loaders(config),
            config.seed,
            training.validation_samples,
            with_text=condition_class(config.condition.kind).uses_text,
            bucket_batches=training.bucket_batches,
            shuffle_shards=training.shuffle_shards,
            local_gigabytes=config.tokens.local_gigabytes,
        )
        manifest = tokens.manifest
        if is_first_process() and not is_remote(config.tokens.path):  # copies of remote shards are checked when opened
            for split in sorted(manifest.splits):
                TokenReader(config.tokens.path, split, manifest).verify()  # otherwise bit errors would go unnoticed
        if Path(config.tokenizer.path).exists():  # a cache can also be used without its tokenizer
            check_belongs(manifest, config.tokenizer.path, tokens_sha256(config.tokenizer.path))
        settings = dataclasses.replace(config.sampling, compile=False, scales=0)
        check_sampling(settings, manifest.layout)  # now instead of at the first validation
        L.seed_everything(config.seed, verbose=False)
        prior = build_prior(config.prior, config.condition, manifest.layout, list(manifest.class_names), manifest.text)
        if isinstance(prior.condition, TextCondition):
            prior.condition.set_empty(tokens.reader("train").empty_caption())
        grammar = build_grammar(manifest.layout)  # for the loader; the prior's own moves to the device of the prior
        if isinstance(grammar, PlacedGrammar):
            tokens.cut_and_note(prior.max_length, grammar.annotate)
        if grammar is not None:
            print(tokens.lengths_report())
        pictures: list[Callback] = []
        sharded = config.trainer.strategy == "fsdp"  # then a single process cannot sample
        if Path(config.tokenizer.path).exists() and not sharded:
            tokenizer, _ = load_tokenizer(config.tokenizer.path)
            prompts = held_out_prompts(tokens.reader("val"), prior)
            prefix = tokenizer.start_prefix(prompts.labels, range(len(prompts)))
            pictures.append(SamplePictures(tokenizer, settings, prompts, prefix))
        module = PriorModule(prior, training, config.seed)
        module.names = lambda indices: tokens.reader("train").keys(np.array(indices))
        trainer = fit(module, tokens, config.trainer, training, path.parent, 1, pictures)
        weights = whole_state(module.average.module)
        if is_first_process():
            extra = {
                "tokenizer_sha256": manifest.tokenizer_sha256,
                "steps": module.step,
                "world_size": trainer.world_size,
                "precision": training.precision,
                "manifest_sha256": tokens.manifest_sha256,
            }
            save_prior(path, prior, config.prior, config.condition, extra, weights)
            print(f"wrote {path}")
    return path


def held_out_prompts(reader: TokenReader | StreamedReader, prior: Prior, count: int = 16) -> Prompts:
    """Prompts of the first ``count`` samples of the validation split."""
    positions = np.arange(count) % len(reader)
    return Prompts.from_batch(widened(to_tensors(reader.read(positions, with_text=prior.condition.uses_text))))


def first_images(config: Config, count: int, keys: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images in evaluation view as batches [B, C, H, W] in [-1, 1] with labels [B], for ``fit``.

    ``keys`` is set to the keys of the current batch.
    """
    images = dataclasses.replace(config.images, skip_corrupt=True)  # broken files are skipped, as in training
    source = open_source(images, "train")
    indices = range(0, len(source), max(1, len(source) // count))[:count]  # spread out: folders are sorted by class
    for start in range(0, len(indices), 64):
        views = [read_eval(source, index, images) for index in indices[start : start + 64]]
        views = [view for view in views if view.readable]
        if views:
            keys[:] = [view.key for view in views]
            yield to_float(torch.stack([view.pixels for view in views])), torch.tensor([view.label for view in views])


def fit(
    module: TokenizerModule | PriorModule,
    loader: L.LightningDataModule,
    place: TrainerConfig,
    training: TokenizerTrainingConfig | PriorTrainingConfig,
    folder: Path,
    num_optimizers: int,
    pictures: Sequence[Callback] = (),
) -> L.Trainer:
    """Train to ``max_steps``, starting from the newest intact checkpoint in ``folder``, if there is one.

    Raises Preempted after SIGTERM and a checkpoint, and RunError if another process of the run has ended.
    """
    quiet_lightning()
    micro_batches = training.max_steps * training.accumulate_batches
    same_precision = SamePrecision(training.precision)
    callbacks: list[Callback] = [same_precision, Throughput(training.max_steps, training.log_every), *pictures]
    if place.progress:
        callbacks.append(StepProgressBar(micro_batches))
    callbacks.append(Checkpoints(folder / FOLDER, training.checkpoint_every))
    manual_optimization = not module.automatic_optimization
    trainer = L.Trainer(
        **placement(place),
        precision=TRAINER_PRECISIONS[training.precision],
        max_steps=trainer_steps(training.max_steps, num_optimizers),
        max_epochs=-1,
        val_check_interval=min(training.validate_every, training.max_steps) * training.accumulate_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_every,
        accumulate_grad_batches=1 if manual_optimization else training.accumulate_batches,
        gradient_clip_val=None if manual_optimization else training.gradient_clip_norm,
        logger=TensorBoardLogger(folder, name="", version="logs"),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,  # Lightning's own callback
        default_root_dir=folder,
    )
    checkpoint = newest_checkpoint(folder / FOLDER)
    if checkpoint:
        print(f"continuing from {checkpoint} in precision {training.precision}")
    with ending_together(trainer):
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if module.step < training.max_steps:
        raise RunError(f"stopped at step {module.step} of {training.max_steps}; run the same command to continue")
    return trainer


def quiet_lightning() -> None:
    """Hide Lightning's hints that do not apply here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for hint in (
        "does not have many workers",
        r"Found \d+ module",  # the averaged copy and the perceptual network are meant to be in eval mode
        "isinstance\\(treespec",
        "predict returned None",
    ):
        warnings.filterwarnings("ignore", message=f".*{hint}")
    torch.set_float32_matmul_precision("high")
