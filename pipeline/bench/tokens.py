"""The token cache: writing compared with encoding alone, size with bare tokens, reading with webdataset."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from data.images.reading import read_eval
from data.images.sources import open_source
from data.images.views import to_float
from data.stream import IndexStream, as_it_is
from data.tokens.manifest import FILE, Manifest
from data.tokens.module import TrainingTokens
from data.tokens.order import block_size
from data.tokens.reader import TokenReader, read_npy
from pipeline.bench.figures import Figure, speeds
from pipeline.bench.place import Place
from pipeline.cache import cache_tokens
from pipeline.text_tokens import TextTokensRequest, cache_text
from stages.precision import autocast

MOST_IMAGES = 20_000
"""Maximum number of images to cache; their pixels are held in memory to measure encoding alone."""
READ_SAMPLES, READ_TOKENS, READ_BATCH = 40_000, 256, 64
"""Number of samples in the cache that is read, tokens per sample, samples per batch."""


def bench_cache(place: Place) -> list[Figure]:
    """Images per second from files to shards, when only encoding from memory, and when only reading; bytes per sample.

    If the loader runs in the main process (``trainer.num_workers=0``), the time for reading adds to that for encoding.
    """
    config = place.config
    tokenizer, folder = place.tokenizer, Path(config.tokens.path)
    sources = [open_source(config.images, split) for split in ("train", "val")]

    if sum(map(len, sources)) > MOST_IMAGES:
        print(f"cache: more than {MOST_IMAGES} images; use a smaller set (images.path=...) of the same image size")
        return []

    def read() -> torch.Tensor:
        views = [read_eval(source, index, config.images) for source in sources for index in range(len(source))]
        return torch.stack([view.pixels for view in views])

    pixels = read()
    flips = (False, True) if config.images.flip else (False,)
    # a block is encoded separately, and small sets have small blocks
    batch = min(config.tokens.encode_batch_size, block_size(len(sources[0])))

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        cache_tokens(config)

    @torch.inference_mode()
    def encode() -> None:
        with autocast(config.tokens.precision, place.device):
            for part in pixels.split(batch):
                for flip in flips:
                    views = to_float(part.flip(-1) if flip else part)
                    tokenizer.encode(views.to(place.device)).to("cpu")

    figures = speeds(
        "cache",
        {"images to shards": write, "encoding alone": encode, "reading alone": read},
        len(pixels),
        "images/s",
        place.repeats,
        {"images to shards": ("encoding alone", (">=", 0.95))},
    )
    return [*figures, size_of(folder)]


def size_of(folder: Path) -> Figure:
    """Bytes per sample in a cache, compared with its bare tokens and label; keys and captions are not counted."""
    manifest = Manifest.load(folder)
    stored = bare = named = 0
    for split, info in manifest.splits.items():
        for shard in info.shards:
            path = folder / split / shard.file
            stored += path.stat().st_size
            content = path.read_bytes()
            with tarfile.open(path) as tar:
                for member in tar:
                    extension = member.name.partition(".")[2]
                    if extension in ("tokens.npy", "label.npy", "header.npy", "offsets.npy"):
                        data = memoryview(content)[member.offset_data : member.offset_data + member.size]
                        bare += read_npy(data).nbytes
                    elif extension != "index.npy":
                        # including its header and padding
                        named += tarfile.BLOCKSIZE + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    count = sum(info.count for info in manifest.splits.values())
    ratio, against = (stored - named) / bare, "bare tokens and labels"
    return Figure("cache", "bytes a sample", (stored - named) / count, "bytes", None, against, ratio, ("<=", 1.05))


def bench_reader(place: Place) -> list[Figure]:
    """Samples per second of one process: random batches from our shards, and webdataset with a record per sample."""
    generator = np.random.default_rng(0)
    text = place.folder / "bytes.bin"
    text.write_bytes(generator.integers(0, 256, READ_SAMPLES * READ_TOKENS, dtype=np.uint8).tobytes())
    config = dataclasses.replace(
        place.config, tokens=dataclasses.replace(place.config.tokens, path=str(place.folder / "read"))
    )
    if not (place.folder / "read" / FILE).exists():
        cache_text(config, TextTokensRequest(file=str(text), length=READ_TOKENS, held_out=0.01))
    reader = TokenReader(config.tokens.path, "train")
    plain = place.folder / "records.tar"
    with webdataset.TarWriter(str(plain)) as writer:
        for row, ids in enumerate(reader.read(np.arange(len(reader)))["ids"]):
            writer.write({"__key__": f"{row:08d}", "tokens.npy": ids, "cls": 0})

    def ours() -> Iterator[object]:
        stream = IndexStream(len(reader), READ_BATCH, 0, 1, 0, 0)
        loader = DataLoader(TrainingTokens(reader, 0), batch_sampler=stream, collate_fn=as_it_is)
        for number, batch in enumerate(loader, 1):
            yield batch
            if number * READ_BATCH >= len(reader):
                return

    def records() -> Iterator[object]:
        dataset = webdataset.WebDataset(str(plain), shardshuffle=False).shuffle(1000).decode()
        yield from dataset.to_tuple("tokens.npy", "cls").batched(READ_BATCH)

    figures = speeds(
        "reader",
        {
            "blocks, random batches": lambda: sum(1 for _ in ours()),
            "webdataset, a record a sample": lambda: sum(1 for _ in records()),
        },
        len(reader),
        "samples/s",
        place.repeats,
        {"blocks, random batches": ("webdataset, a record a sample", None)},
    )
    one_process = Figure("reader", "one process", figures[0].value, "samples/s", figures[0].spread, goal=(">=", 1e5))
    return [*figures, one_process]
