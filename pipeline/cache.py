"""cache-tokens: encode images with a tokenizer and write token shards and a manifest.

Notes:

- The unit of work is a shard: a killed run continues with the missing shards, on any number of processes.
- ``Trainer.predict`` handles devices, precision and launching; ``pipeline.encoding`` distributes the work.
- Only the first process locks the folder, checks its config and tokenizer, and writes the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from data.files import write_atomically
from data.images.source import CorruptImage, ImageSource, sha256_of
from data.images.sources import open_source
from data.tokens.errors import CacheError
from data.tokens.manifest import FILE, MEND, Manifest, SplitInfo
from data.tokens.shards import ShardInfo, finished_shard, to_json, total_remarks
from pipeline.callbacks import TRAINER_PRECISIONS, SamePrecision
from pipeline.config import Config, check_command
from pipeline.cores import use_threads
from pipeline.encoding import Encoding, SplitPlan
from pipeline.models import check_images
from pipeline.placement import placement, processes_here
from pipeline.processes import end_with_parent, is_first_process
from pipeline.ranks import ending_together
from pipeline.run import need, stage_folder
from pipeline.train import quiet_lightning
from stages.conditions.encoders import TextEncoder, build_text_encoder
from stages.contract import Tokenizer
from stages.weights import load_tokenizer, tokens_sha256

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
STATE = "state.json"
STATE_PARTS = {
    "tokenizer_sha256": "tokens of another tokenizer",
    "sources": "tokens of other images",
    "text": "captions of another text encoder",
}
VIEWS = ("identity", "flip")
# At the end, a rank waits for the slowest one, up to a whole shard: on a CPU longer than torch's default of 30 minutes.
RANK_TIMEOUT = timedelta(hours=24)


def cache_tokens(config: Config) -> Path:
    """Encode the train and val images. Returns the folder, ``config.tokens.path``.

    Continues an unfinished cache, and returns at once if nothing is missing. For one device type, precision and thread
    count, the bytes of the files do not depend on the number of processes or on interruptions.

    Raises ConfigError for a URL; RunError without a tokenizer, for one of another image size, or if the folder is in
    use or was started with another config; CacheError if it was started with another tokenizer, other images or another
    text encoder; InputError for a text encoder that is not available or has no captions to read; CorruptImage for an
    unreadable image unless ``images.skip_corrupt``.
    """
    end_with_parent()
    check_command("cache-tokens", config)
    tokenizer_path = need(config.tokenizer.path, "tokenizer", "train-tokenizer", config)
    folder = Path(config.tokens.path)
    with stage_folder(folder, config, "tokens") as config:
        tokenizer, metadata = load_tokenizer(tokenizer_path)
        check_images(tokenizer, config.images.channels, config.images.size, config.images.size)
        sources = {split: open_source(config.images, split) for split in SPLITS}
        plans: dict[str, SplitPlan] = {
            split: SplitPlan(split, source, folder / split, config) for split, source in sources.items()
        }
        state: dict[str, Any] = {}
        if is_first_process():
            state = {
                "tokenizer_sha256": tokens_sha256(tokenizer_path),
                "sources": {split: source.fingerprint() for split, source in sources.items()},
            }
            hold_to_state(folder, state)
        missing = [(name, number) for name, plan in plans.items() for number in plan.missing()]
        if not missing and (folder / FILE).exists():
            print(f"{folder}: the token cache is complete, nothing to do")
            return folder
        use_threads(processes_here(config.trainer))
        start = time.perf_counter()
        text_encoder = build_text_encoder(config.tokens, captions_of(sources["train"], config))
        text = None if text_encoder is None else text_encoder.spec
        if is_first_process():
            hold_to_state(folder, {**state, "text": sha256_of([to_json(text)])})
        if missing:
            encode(config, tokenizer, text_encoder, plans, missing)
        if is_first_process():
            manifest = make_manifest(config, metadata, tokenizer, text, plans, state)
            manifest.save(folder)
            report(folder, manifest, missing, time.perf_counter() - start)
    return folder


def captions_of(source: ImageSource, config: Config) -> Iterator[str]:
    """The captions of the images of a source, in order. Raises CorruptImage unless ``images.skip_corrupt``."""
    for index in range(len(source)):
        try:
            yield source.text(index)
        except CorruptImage:
            if not config.images.skip_corrupt:
                raise


def hold_to_state(folder: Path, state: dict[str, Any]) -> None:
    """Record what this cache is made of. Raises CacheError if it was started with something else.

    ``state`` may gain keys from one call to the next: the text encoder is known later than tokenizer and images.
    """
    path = folder / STATE
    written: dict[str, Any] = {}
    if path.exists():
        try:
            written = json.loads(path.read_bytes())
        except ValueError as error:
            raise CacheError(f"{path} is damaged; delete {folder} and {MEND}") from error
    for key, mismatch in STATE_PARTS.items():
        if key in state and key in written and written[key] != state[key]:
            raise CacheError(f"{folder} contains {mismatch}; delete it and {MEND}")
    if not state.keys() <= written.keys():
        write_atomically(path, to_json(state))


def encode(
    config: Config,
    tokenizer: Tokenizer,
    text_encoder: TextEncoder | None,
    plans: Mapping[str, SplitPlan],
    missing: list[tuple[str, int]],
) -> None:
    """Write the missing shards, each (split, number), on all devices. Returns on every rank when all are done."""
    # nothing is trained here, so there is no training state to shard
    arguments = placement(dataclasses.replace(config.trainer, strategy="ddp"), RANK_TIMEOUT)
    quiet_lightning()
    # No TF32 here: tokens are written once and kept, and its rounding can change codes near a decision boundary.
    torch.set_float32_matmul_precision("highest")
    precision = config.tokens.precision
    trainer = L.Trainer(
        **arguments,
        precision=TRAINER_PRECISIONS[precision],
        logger=False,
        enable_checkpointing=False,
        callbacks=[SamePrecision(precision)],
    )
    encoding = Encoding(tokenizer, text_encoder, plans, missing, config)
    try:
        with ending_together(trainer):
            trainer.predict(encoding, return_predictions=False)
    finally:
        encoding.abort()


def make_manifest(
    config: Config,
    metadata: dict[str, Any],
    tokenizer: Tokenizer,
    text: dict[str, Any] | None,
    plans: Mapping[str, SplitPlan],
    state: dict[str, Any],
) -> Manifest:
    """Build the manifest of the shards on disk; ``text``: text encoder spec. Raises CacheError for a missing shard."""
    splits = {}
    for name, plan in plans.items():
        shards: list[ShardInfo] = []
        for number in range(plan.num_shards):
            shard = finished_shard(plan.folder, number)
            if shard is None:
                raise CacheError(f"{plan.folder}: shard {number} was not written; {MEND}")
            shards.append(shard)
        splits[name] = SplitInfo(
            count=sum(shard.count for shard in shards),
            captions=sum(shard.captions for shard in shards),
            skipped=sum(len(shard.skipped) for shard in shards),
            block_size=plan.block_size,
            source_fingerprint=state["sources"][name],
            shards=tuple(shards),
            captions_cut=sum(shard.captions_cut for shard in shards),
            remarks=total_remarks(shard.remarks for shard in shards),
        )
    return Manifest(
        tokenizer_sha256=state["tokenizer_sha256"],
        tokenizer_kind=metadata["kind"],
        tokenizer_config=metadata["config"],
        layout=tokenizer.layout,
        image_size=tokenizer.layout.image_size,
        channels=tokenizer.channels,
        views=VIEWS if config.images.flip else VIEWS[:1],
        permutation_seed=config.tokens.permutation_seed,
        encode_batch_size=config.tokens.encode_batch_size,
        precision=config.tokens.precision,
        class_names=tuple(plans["train"].source.class_names),
        splits=splits,
        text=text,
    )


def report(folder: Path, manifest: Manifest, written: list[tuple[str, int]], seconds: float) -> None:
    """Print what was written and how fast."""
    images = sum(manifest.splits[split].shards[number].count for split, number in written)
    size = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    counts = ", ".join(
        f"{split.count} {name}" + (f" ({split.skipped} unreadable, skipped)" if split.skipped else "")
        for name, split in manifest.splits.items()
    )
    print(f"{folder}: {counts}; {size / 1e6:.1f} MB; {images} encoded now at {images / seconds:.0f} images/s")
    for name, count in total_remarks(split.remarks for split in manifest.splits.values()).items():
        print(f"{folder}: {count} {name.replace('_', ' ')}")
    if manifest.text is not None:
        captions = sum(split.captions for split in manifest.splits.values())
        cut = sum(split.captions_cut for split in manifest.splits.values())
        print(
            f"{folder}: {captions} captions encoded by {manifest.text['encoder']}; {cut} of them longer than "
            f"{manifest.text['max_tokens']} tokens (tokens.max_caption_tokens) and cut"
        )
