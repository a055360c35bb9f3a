"""Encoded captions in the token cache: written data is read back, damage is refused."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.files import file_sha256
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest, SplitInfo
from data.tokens.module import TokenDataModule
from data.tokens.reader import TokenReader
from data.tokens.shards import Block, ShardWriter, to_npy
from tests.data.test_tokens import LAYOUTS, make_block, write_cache

STATES: dict[str, Any] = {"encoder": "toy", "max_tokens": 6, "width": 5, "empty_length": 2, "sha256": "0" * 64}
IDS: dict[str, Any] = {"encoder": "words", "max_tokens": 6, "width": 0, "empty_length": 0, "vocabulary": ["a", "b"]}


def caption(spec: dict[str, Any], length: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if spec["width"]:
        return generator.normal(size=(length, spec["width"])).astype(np.float16)
    return generator.integers(0, 3, (length, 1)).astype(np.uint16)


def write_captioned(
    folder: Path, spec: dict[str, Any], layout: str = "one field", counts: tuple[int, ...] = (5, 5, 0, 3)
) -> list[Block]:
    """The cache of ``write_cache`` with captions of 0 to 6 tokens; some samples have no text."""
    write_cache(folder, LAYOUTS[layout], counts=(1,))
    manifest, blocks = Manifest.load(folder), []
    for number, count in enumerate(counts):
        block = make_block(LAYOUTS[layout], number, sum(counts[:number]), count)
        lengths = [0 if not text else 1 + n % 6 for n, text in enumerate(block.texts[:count])]
        block.captions = [caption(spec, spec["empty_length"], 99)]
        block.captions += [caption(spec, length, 1000 * number + n) for n, length in enumerate(lengths)]
        block.captions_cut = int(count > 4)
        blocks.append(block)
    splits = {}
    for split in ("train", "val"):
        with ShardWriter(folder / split, 0, LAYOUTS[layout]) as writer:
            for block in blocks:
                writer.write(block)
            shard = writer.commit([])
        assert shard.captions_cut == sum(count > 4 for count in counts)
        splits[split] = SplitInfo(sum(counts), shard.captions, 0, 5, "images", (shard,), shard.captions_cut)
    replace(manifest, text=spec, splits=splits).save(folder)
    return blocks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [STATES, IDS], ids=["states", "ids"])
def test_captions_are_read_as_written(tmp_path: Path, spec: dict[str, Any], layout: str) -> None:
    blocks = write_captioned(tmp_path, spec, layout)
    manifest, reader = Manifest.load(tmp_path), TokenReader(tmp_path, "train")
    assert manifest.text == spec and manifest.splits["train"].captions_cut == 2
    captions = [states for block in blocks for states in block.captions[1:]]
    positions = np.random.default_rng(0).integers(0, 13, 40)
    batch = reader.read(positions, np.arange(40) % 2, with_text=True)
    assert batch["text_length"].dtype == np.int64
    assert batch["text"].shape == (40, batch["text_length"].max(), spec["width"] or 1)
    assert batch["text"].dtype == captions[0].dtype
    for position, row, length in zip(positions, batch["text"], batch["text_length"], strict=True):
        assert np.array_equal(row[:length], captions[position]) and not row[length:].any()
    plain = reader.read(positions, np.arange(40) % 2)
    assert batch.keys() - plain.keys() == {"text", "text_length"}
    assert all(np.array_equal(plain[name], batch[name]) for name in plain)
    assert np.array_equal(reader.empty_caption(), caption(spec, spec["empty_length"], 99))
    without = np.flatnonzero([not len(states) for states in captions])
    nothing = reader.read(without[:1], with_text=True)
    assert nothing["text"].shape == (1, 0, spec["width"] or 1) and nothing["text_length"].tolist() == [0]


@pytest.mark.parametrize("spec", [STATES, IDS], ids=["states", "ids"])
def test_the_module_gives_text_where_it_is_wanted_and_there(tmp_path: Path, spec: dict[str, Any]) -> None:
    write_captioned(tmp_path / "with", spec)
    write_cache(tmp_path / "without", LAYOUTS["one field"])
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 5, "validation_samples": 10}
    for folder, with_text in (("with", True), ("with", False), ("without", True)):
        module = TokenDataModule(tmp_path / folder, num_workers=with_text, with_text=with_text, **arguments)
        for loader in (module.train_dataloader(), module.val_dataloader()):
            batch = module.on_after_batch_transfer(next(iter(loader)), 0)
            assert ("text" in batch) == ("text_length" in batch) == (folder == "with" and with_text)
            if "text" in batch:
                reader = TokenReader(tmp_path / "with", "train")
                stored = reader.read(batch["index"].numpy(), with_text=True)
                assert batch["text"].dtype == (torch.float32 if spec["width"] else torch.int64)
                assert torch.equal(batch["text"], torch.from_numpy(stored["text"].astype(np.float32)).to(batch["text"]))
                assert batch["text_length"].dtype == torch.int64
                assert batch["text_length"].tolist() == stored["text_length"].tolist()


def test_a_cache_without_captions_says_so_and_older_manifests_load(tmp_path: Path) -> None:
    write_cache(tmp_path, LAYOUTS["one field"])
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["text"], data["sha256"]
    for split in data["splits"].values():
        del split["captions_cut"]
        for shard in split["shards"]:
            del shard["captions_cut"]
    path.write_text(json.dumps(data))
    reader = TokenReader(tmp_path, "train")
    assert reader.manifest.text is None
    for read in (lambda: reader.read(np.arange(3), with_text=True), reader.empty_caption):
        with pytest.raises(CacheError, match="no encoded captions; set tokens.text_encoder"):
            read()


def damage(folder: Path, members: dict[str, bytes | None]) -> None:
    """Replace or drop (None) members of every record of the train shard, and update the manifest accordingly."""
    path, kept = folder / "train" / "000000.tar", []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = members.get(member.name.partition(".")[2], file.read())
            if content is not None:
                kept.append((member.name, content))
    with tarfile.open(path, "w") as tar:
        for name, content in kept:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    manifest = Manifest.load(folder)
    split = manifest.splits["train"]
    shard = replace(split.shards[0], bytes=path.stat().st_size, sha256=file_sha256(path))
    replace(manifest, splits={**manifest.splits, "train": replace(split, shards=(shard,))}).save(folder)


@pytest.mark.parametrize(
    "members",
    [
        {"condition.npy": None},
        {"condition_offsets.npy": None},
        {"condition.npy": b"no array"},
        {"condition.npy": to_npy(np.zeros((3, 5), np.float16))},
        {"condition.npy": to_npy(np.zeros((3, 4), np.float16)), "condition_offsets.npy": to_npy(np.arange(4))},
        {"condition_offsets.npy": to_npy(np.arange(4))},
        {"condition.npy": to_npy(np.zeros((2, 5), np.float16)), "condition_offsets.npy": to_npy(np.array([0, 3, 2]))},
    ],
)
def test_damaged_captions_are_refused(tmp_path: Path, members: dict[str, bytes | None]) -> None:
    write_captioned(tmp_path, STATES, counts=(1, 1))
    damage(tmp_path, {})
    assert len(TokenReader(tmp_path, "train").empty_caption()) == 2
    damage(tmp_path, members)
    with pytest.raises(CacheError, match="foreign or damaged"):
        TokenReader(tmp_path, "train")
