"""Token shards: written data is read back, damage is refused, nothing is unpickled."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from data.layout import Field, Scale, TokenLayout
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest, SplitInfo, check_belongs
from data.tokens.module import TokenDataModule, TrainingTokens, ValidationTokens
from data.tokens.order import block_size, random_bits, source_order
from data.tokens.reader import TokenReader, read_npy
from data.tokens.shards import Block, ShardWriter, finished_shard, to_npy, token_dtype

PAIR = (Field("high", 512), Field("low", 300))


def fixed_layout(fields: tuple[Field, ...], header: tuple[Field, ...] = ()) -> TokenLayout:
    return TokenLayout(
        tuple(Scale(f"level{k}", k * k, (k, k), 0, fields, (k * 8, k * 8)) for k in (1, 2)), header=header
    )


def ragged_layout() -> TokenLayout:
    scale = Scale("list", 12, None, 0, PAIR, (8, 8))
    return TokenLayout((scale,), header=(Field("threshold", 40),), max_length=12, ends="token")


def make_block(layout: TokenLayout, number: int, start: int, count: int, views: int = 2) -> Block:
    """Random tokens; the keys contain the source indices."""
    generator = np.random.default_rng(number)
    length, limits = layout.length, [field.vocabulary_size for field in layout.scales[0].fields]
    ids = np.stack([generator.integers(0, limit, (count, views, length)) for limit in limits], axis=-1)
    lengths = np.full((count, views), length)
    if layout.ends != "fixed":
        lengths = generator.integers(0, length + 1, (count, views))
    return Block(
        number=number,
        ids=ids,
        lengths=lengths,
        header=generator.integers(0, 40, (count, views, len(layout.header))),
        labels=generator.integers(0, 10, count),
        indices=np.arange(start, start + count)[::-1],
        keys=[f"a.b/{index}.png" for index in range(start, start + count)],
        texts=["", *[f"caption {index} é" for index in range(1, count)]],
    )


def write_cache(folder: Path, layout: TokenLayout, counts: tuple[int, ...] = (5, 5, 0, 3)) -> list[Block]:
    """A cache with two blocks per shard, the same in train and val."""
    blocks = [make_block(layout, n, sum(counts[:n]), count) for n, count in enumerate(counts)]
    splits = {}
    for split in ("train", "val"):
        shards = []
        for number in range(0, len(blocks), 2):
            with ShardWriter(folder / split, number // 2, layout) as writer:
                for block in blocks[number : number + 2]:
                    writer.write(block)
                shards.append(writer.commit([]))
        splits[split] = SplitInfo(sum(counts), sum(shard.captions for shard in shards), 0, 5, "images", tuple(shards))
    Manifest(
        tokenizer_sha256="0" * 64,
        tokenizer_kind="toy",
        tokenizer_config={},
        layout=layout,
        image_size=layout.image_size,
        channels=3,
        views=("identity", "flip"),
        permutation_seed=0,
        encode_batch_size=4,
        precision="32",
        class_names=("ant", "bee"),
        splits=splits,
    ).save(folder)
    return blocks


LAYOUTS = {
    "one field": fixed_layout((Field("code", 256),)),
    "two fields and header": fixed_layout(PAIR, (Field("threshold", 40),)),
    "ragged": ragged_layout(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_is_written_is_read(tmp_path: Path, layout: TokenLayout) -> None:
    blocks = write_cache(tmp_path, layout)
    reader = TokenReader(tmp_path, "train")
    reader.verify()
    assert len(reader) == 13 and reader.layout == layout
    ids, lengths, header = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("ids", "lengths", "header"))
    positions = np.random.default_rng(1).integers(0, 13, 50)
    views = np.arange(50) % 2
    batch = reader.read(positions, views)
    assert batch["ids"].dtype == token_dtype(layout.max_vocabulary_size)
    for place, (position, view) in enumerate(zip(positions, views, strict=True)):
        length = lengths[position, view]
        assert np.array_equal(batch["ids"][place, :length], ids[position, view, :length])
        assert not batch["ids"][place, length:].any()
        if layout.ends != "fixed":
            assert batch["length"][place] == length
        if layout.header:
            assert np.array_equal(batch["header"][place], header[position, view])
    assert np.array_equal(batch["label"], np.concatenate([b.labels for b in blocks])[positions])
    assert np.array_equal(reader.source_indices, np.concatenate([b.indices for b in blocks]))
    assert reader.keys(positions) == [f"a.b/{position}.png" for position in positions]
    assert reader.texts(np.asarray([0, 1, 12])) == ["", "caption 1 é", "caption 2 é"]
    assert pickle.loads(pickle.dumps(reader)).read(positions)["ids"].shape == reader.read(positions)["ids"].shape
    with pytest.raises(IndexError):
        reader.read(np.asarray([13]))


def test_equal_input_gives_equal_bytes_that_webdataset_reads(tmp_path: Path) -> None:
    layout = LAYOUTS["one field"]
    blocks = write_cache(tmp_path / "a", layout)
    write_cache(tmp_path / "b", layout)
    paths = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in paths)
    records = list(webdataset.WebDataset(str(tmp_path / "a/train/000000.tar"), shardshuffle=False))
    assert [record["__key__"] for record in records] == ["00000000", "00000001"]
    stored = np.load(io.BytesIO(records[1]["tokens.npy"]), allow_pickle=False)
    assert stored.dtype == np.uint8 and np.array_equal(stored, blocks[1].ids[..., 0])
    with tarfile.open(tmp_path / "a/train/000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}


def test_an_unfinished_or_impossible_shard_leaves_nothing(tmp_path: Path) -> None:
    layout = LAYOUTS["one field"]
    block = make_block(layout, 0, 0, 4)
    block.ids[2, 1, 3, 0] = 256
    with pytest.raises(CacheError, match=r"a\.b/2\.png"), ShardWriter(tmp_path, 0, layout) as writer:
        writer.write(block)
    assert not list(tmp_path.iterdir())
    assert finished_shard(tmp_path, 0) is None


def damage(folder: Path, how: str) -> None:
    shard, manifest = folder / "train" / "000000.tar", folder / "manifest.json"
    data = json.loads(manifest.read_bytes())
    if how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif how == "missing shard":
        shard.unlink()
    elif how == "missing manifest":
        manifest.unlink()
    elif how == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif how == "foreign manifest":
        manifest.write_text('{"shards": []}')
    elif how == "other schema":
        manifest.write_text(json.dumps({**data, "schema": 99}))
    elif how == "incomplete manifest":
        del data["layout"]["scales"], data["sha256"]
        manifest.write_text(json.dumps(data))
    elif how == "no tar":
        shard.write_bytes(b"x" * shard.stat().st_size)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated shard", "000000.tar is truncated"),
        ("missing shard", "000000.tar is missing"),
        ("no tar", "000000.tar is no tar"),
        ("missing manifest", "manifest.json is missing"),
        ("truncated manifest", "truncated or no JSON"),
        ("foreign manifest", "not the manifest of a token cache"),
        ("other schema", "schema 99"),
        ("incomplete manifest", "missing or foreign"),
    ],
)
def test_damage_is_refused_with_the_cure(tmp_path: Path, how: str, says: str) -> None:
    write_cache(tmp_path, LAYOUTS["one field"])
    damage(tmp_path, how)
    with pytest.raises(CacheError, match=says):
        TokenReader(tmp_path, "train")


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    write_cache(tmp_path, LAYOUTS["one field"])
    shard = tmp_path / "train" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x93NUMPY") + 130] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="sha256"):
        TokenReader(tmp_path, "train").verify()


def test_manifest_round_trip_and_belonging(tmp_path: Path) -> None:
    write_cache(tmp_path, ragged_layout())
    manifest = Manifest.load(tmp_path)
    manifest.save(tmp_path / "train")
    assert Manifest.load(tmp_path / "train") == manifest
    assert manifest.splits["train"].captions == 13 - 3
    with pytest.raises(CacheError, match="make cache-tokens"):
        check_belongs(manifest, tmp_path / "other.safetensors", "1" * 64)
    with pytest.raises(CacheError, match="no split 'test'; it has train, val"):
        manifest.split("test")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (tmp_path / "exploded").touch, ()

    buffer = io.BytesIO()
    np.save(buffer, np.asarray([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(CacheError, match="objects"):
        read_npy(memoryview(buffer.getvalue()))
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError):
        to_npy(np.asarray([None], dtype=object))
    with pytest.raises(CacheError, match="fewer or more bytes"):
        read_npy(memoryview(to_npy(np.arange(9))[:-1]))


def test_order_is_a_permutation_that_never_changes() -> None:
    order = source_order(1000, 3)
    assert sorted(order) == list(range(1000)) and not np.array_equal(order, source_order(1000, 4))
    # these values are part of the format: another order would break caches that are continued
    assert source_order(12, 0).tolist() == [6, 4, 11, 7, 3, 10, 8, 1, 2, 0, 5, 9]
    assert [block_size(n) for n in (10, 5000, 60_000, 1_281_167)] == [16, 19, 234, 1024]
    bits = random_bits(0, np.arange(10_000), 5)
    assert len(set(bits.tolist())) == 10_000 and 4800 < int((bits % np.uint64(2)).sum()) < 5200


def test_training_batches_hold_every_sample_once_an_epoch(tmp_path: Path) -> None:
    write_cache(tmp_path, LAYOUTS["one field"])
    module = TokenDataModule(tmp_path, batch_size=4, num_workers=1, seed=5, validation_samples=10)
    seen = []
    for number, batch in enumerate(module.train_dataloader()):
        assert batch["ids"].dtype == torch.uint8
        batch = module.on_after_batch_transfer(batch, 0)
        assert batch["ids"].shape == (4, 5, 1) and batch["ids"].dtype == torch.int64
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        seen += batch["index"].tolist()
        if number == 12:
            break
    assert len(seen) == 4 * 13 and all(sorted(seen[13 * e : 13 * (e + 1)]) == list(range(13)) for e in range(4))


@pytest.mark.parametrize("bucket_batches", [1, 3])
@pytest.mark.parametrize("shuffle_shards", [0, 1])
def test_ranks_together_take_the_batches_of_one_process(
    tmp_path: Path, bucket_batches: int, shuffle_shards: int
) -> None:
    write_cache(tmp_path, LAYOUTS["ragged"])

    def batches(batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        keys = {"bucket_batches": bucket_batches, "shuffle_shards": shuffle_shards}
        module = TokenDataModule(tmp_path, batch_size, num_workers=0, seed=5, validation_samples=10, **keys)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        return [batch["index"].tolist() for batch in islice(module.train_dataloader(), 9)]

    first, second = (batches(2, rank, 2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == batches(4, 0, 1)


def test_view_is_drawn_by_epoch_and_index_alone(tmp_path: Path) -> None:
    write_cache(tmp_path, LAYOUTS["one field"], counts=(400, 400))
    reader = TokenReader(tmp_path, "train")
    dataset = TrainingTokens(reader, seed=5)
    pairs = [(epoch, index) for epoch in range(3) for index in range(800)]
    whole = dataset.__getitems__(pairs)["ids"]
    alone = torch.cat([dataset.__getitems__([pair])["ids"] for pair in pairs[::97]])
    assert torch.equal(alone, whole[::97])
    first = torch.from_numpy(reader.read(np.arange(800), 0)["ids"])
    flipped = (whole.view(3, 800, 5) != first[..., 0]).any(-1)
    assert 0.45 < flipped.float().mean() < 0.55
    assert 0.4 < (flipped[0] != flipped[1]).float().mean() < 0.6


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_each_sample_once_over_equal_ranks(tmp_path: Path, world_size: int) -> None:
    write_cache(tmp_path, LAYOUTS["one field"])
    reader = TokenReader(tmp_path, "val")
    ranks = [ValidationTokens(reader, 4, 10, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [rank[number] for rank in ranks for number in range(len(rank))]
    assert all(batch["ids"].shape == (4, 5, 1) for batch in batches)
    index, weight = (torch.cat([batch[name] for batch in batches]) for name in ("index", "weight"))
    assert sorted(index[weight == 1].tolist()) == list(range(10)) and set(index[weight == 0].tolist()) <= {0}
    ids = torch.cat([batch["ids"] for batch in batches])
    assert np.array_equal(ids, reader.read(index.numpy())["ids"])


def test_a_moved_cache_still_reads(tmp_path: Path) -> None:
    write_cache(tmp_path / "here", LAYOUTS["one field"])
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert len(TokenReader(tmp_path / "there", "train")) == 13
