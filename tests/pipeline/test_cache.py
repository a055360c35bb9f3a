"""The cache command: the same bytes however it is run, and refusals that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import InputError
from data.images.reading import read_eval
from data.images.source import CorruptImage
from data.images.sources import open_source
from data.images.views import to_float
from data.tokens.errors import CacheError
from data.tokens.manifest import Manifest, check_belongs
from data.tokens.reader import TokenReader
from pipeline.cache import cache_tokens
from pipeline.config import Config, ConfigError, load_config
from pipeline.errors import RunError
from pipeline.run import stage_folder
from stages.conditions.encoders import build_text_encoder, load_text_encoder
from stages.factory import TOKENIZERS
from stages.weights import load_tokenizer, tokens_sha256
from tests.pipeline import cache_toy
from tests.reliability.commands import two
from tests.waiting import wait_until

ROOT = Path(cache_toy.__file__).resolve().parents[2]
COUNT = 190  # 171 train images in 11 blocks of 16 (the last one short) in 6 shards; 19 val images in 2 blocks


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "toy", ("tests.pipeline.cache_toy:ToyConfig", "tests.pipeline.cache_toy:Toy"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a tokenizer and a config."""
    folder = tmp_path_factory.mktemp("world")
    cache_toy.write_images(folder / "images", COUNT)
    cache_toy.write_tokenizer(folder / "toy.safetensors")
    (folder / "toy.yaml").write_text(
        f"images: {{kind: folder, path: {folder}/images, size: {cache_toy.SIZE}, flip: true}}\n"
        f"tokenizer: {{kind: toy, path: {folder}/toy.safetensors}}\n"
        "tokens: {encode_batch_size: 6, blocks_per_shard: 2}\n"
        "trainer: {accelerator: cpu, num_workers: 0, progress: false}\n"
    )
    return folder


def configured(world: Path, tokens: Path, *overrides: str) -> Config:
    return load_config(world / "toy.yaml", [f"tokens.path={tokens}", f"run={tokens.parent}", *overrides])


@pytest.fixture(scope="module")
def cached(world: Path) -> Path:
    """The cache that one process writes without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOKENIZERS, "toy", ("tests.pipeline.cache_toy:ToyConfig", "tests.pipeline.cache_toy:Toy"))
        return cache_tokens(configured(world, world / "one"))


@pytest.fixture(scope="module")
def captioned(world: Path) -> Path:
    """The same images; all but every third have a caption of their own or one that others share, one a long one."""
    shutil.copytree(world / "images", world / "captioned")
    for number, image in enumerate(sorted((world / "captioned").rglob("*.png"))):
        if number % 3:
            shared = f"a {image.parent.name} 😀" if number % 2 else f"picture {number}, {'noise ' * (number % 5)}"
            image.with_suffix(".txt").write_text("long " * 5000 if number == 100 else shared, encoding="utf-8")
    return world / "captioned"


def start(world: Path, tokens: Path, *overrides: str, seconds: float = 0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOY_SECONDS": str(seconds)}
    command = [
        sys.executable,
        "-m",
        "tests.pipeline.cache_toy",
        world / "toy.yaml",
        f"tokens.path={tokens}",
        f"run={tokens.parent}",
    ]
    return subprocess.Popen([*command, *overrides], env=environment)


def cache_by_two(world: Path, tokens: Path, *overrides: str) -> str:
    """Cache with two processes; returns what they said."""
    given = ["cache-tokens", world / "toy.yaml", f"tokens.path={tokens}", f"run={tokens.parent}", *overrides]
    ended = two(world, *given, setups=(cache_toy.register, cache_toy.register))
    assert [rank.code for rank in ended] == [0, 0], ended
    return "".join(rank.said for rank in ended)


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of a cache but the lock and the config, whose paths are no part of it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "config.yaml"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_reader_gives_every_image_once_with_its_own_tokens(world: Path, cached: Path) -> None:
    config = configured(world, cached)
    tokenizer, _ = load_tokenizer(config.tokenizer.path)
    manifest = Manifest.load(cached)
    check_belongs(manifest, config.tokenizer.path, tokens_sha256(config.tokenizer.path))
    assert manifest.views == ("identity", "flip") and manifest.class_names == ("class0", "class1", "class2")
    for split in ("train", "val"):
        source, reader = open_source(config.images, split), TokenReader(cached, split)
        reader.verify()
        assert sorted(reader.source_indices.tolist()) == list(range(len(source)))
        positions = np.arange(len(reader))
        views = [read_eval(source, int(index), config.images) for index in reader.source_indices]
        assert reader.keys(positions) == [view.key for view in views]
        assert reader.labels.tolist() == [view.label for view in views]
        pixels = to_float(torch.stack([view.pixels for view in views]))
        for number, seen in enumerate((pixels, pixels.flip(-1))):
            assert np.array_equal(reader.read(positions, number)["ids"], tokenizer.encode(seen).ids.numpy())


def test_a_finished_cache_is_left_alone(world: Path, cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in cached.rglob("*") if path.name != ".lock"}
    cache_tokens(configured(world, cached))
    assert "complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in cached.rglob("*") if path.name != ".lock"}


def test_two_processes_write_the_same_bytes_though_one_has_no_shard(world: Path, cached: Path) -> None:
    tokens = world / "two"
    cache_by_two(world, tokens)
    assert contents(tokens) == contents(cached)
    # One shard and two ranks: the second one has nothing to do, and must say so without failing.
    (tokens / "train" / "000003.tar").unlink()
    cache_by_two(world, tokens)
    assert contents(tokens) == contents(cached)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_run_leaves_no_process_and_continues_to_the_same_bytes(world: Path, cached: Path) -> None:
    killed = world / "killed"
    process = start(world, killed, "trainer.devices=2", "trainer.num_workers=1", seconds=0.15)
    try:
        wait_until(lambda: list(killed.glob("train/*.json")) or process.poll() is not None, "a shard")
        assert process.poll() is None
        family = descendants(process.pid)
        with pytest.raises(RunError, match="in use"):
            cache_tokens(configured(world, killed))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(family) >= 3, "one other rank and two loader processes"
    wait_until(lambda: not any(map(alive, family)), "orphans of the kill to end")
    assert not (killed / "manifest.json").exists()
    done = {path: path.with_suffix(".tar").stat().st_mtime_ns for path in killed.glob("train/*.json")}
    assert 0 < len(done) < 6
    with pytest.raises(CacheError, match="make cache-tokens"):
        TokenReader(killed, "train")
    cache_tokens(configured(world, killed))
    assert contents(killed) == contents(cached)
    again = {path: path.with_suffix(".tar").stat().st_mtime_ns for path in done}
    assert again == done, "finished shards are not written again"


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_another_tokenizer_is_refused(world: Path, cached: Path, tmp_path: Path) -> None:
    cache_toy.write_tokenizer(tmp_path / "other.safetensors", offset=1)
    with pytest.raises(CacheError, match="another tokenizer.*make cache-tokens"):
        check_belongs(Manifest.load(cached), "other.safetensors", tokens_sha256(tmp_path / "other.safetensors"))
    begun = tmp_path / "begun"
    shutil.copytree(cached, begun)
    (begun / "manifest.json").unlink()
    (begun / "train" / "000000.tar").unlink()
    with pytest.raises(CacheError, match="another tokenizer.*make cache-tokens"):
        cache_tokens(configured(world, begun, f"tokenizer.path={tmp_path}/other.safetensors"))


def test_other_images_and_other_config_are_refused(world: Path, cached: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(cached, begun)
    state = begun / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"val":"', b'"val":"0'))
    with pytest.raises(CacheError, match="other images"):
        cache_tokens(configured(world, begun))
    with pytest.raises(RunError, match="encode_batch_size"):
        cache_tokens(configured(world, cached, "tokens.encode_batch_size=7"))
    with pytest.raises(RunError, match="in use"), stage_folder(begun, configured(world, begun), "tokens"):
        cache_tokens(configured(world, begun))


def test_missing_and_unfit_tokenizer(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="train-tokenizer"):
        cache_tokens(configured(world, tmp_path / "tokens", f"tokenizer.path={tmp_path}/none.safetensors"))
    with pytest.raises(RunError, match="images.size"):
        cache_tokens(configured(world, tmp_path / "tokens", "images.size=32"))


def test_corrupt_image_is_named_or_skipped_and_counted(world: Path, cached: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    broken = TokenReader(cached, "train").keys(np.asarray([20]))[0]
    (tmp_path / "images" / broken).write_bytes(b"no image")
    overrides = [f"images.path={tmp_path}/images"]
    with pytest.raises(CorruptImage, match=broken):
        cache_tokens(configured(world, tmp_path / "strict", *overrides))
    assert not list((tmp_path / "strict").glob("*/*.tmp-*"))
    skipping = cache_tokens(configured(world, tmp_path / "skipping", *overrides, "images.skip_corrupt=true"))
    manifest = Manifest.load(skipping)
    assert manifest.splits["train"].skipped == 1
    assert [shard.skipped for shard in manifest.splits["train"].shards if shard.skipped] == [(broken,)]
    whole, short = TokenReader(cached, "train"), TokenReader(skipping, "train")
    kept = np.delete(np.arange(len(whole)), 20)
    assert np.array_equal(whole.read(kept)["ids"], short.read(np.arange(len(short)))["ids"])
    # The hole shortens its own block; all other shards are the same bytes.
    for old, new in zip(manifest.splits["train"].shards, Manifest.load(cached).splits["train"].shards, strict=True):
        assert (old.sha256 == new.sha256) == (not old.skipped)


@pytest.mark.parametrize("name", ["words", "minilm"])
def test_encoded_captions_are_the_same_however_they_are_cached(
    world: Path, captioned: Path, cached: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"images.path={captioned}", f"tokens.text_encoder={name}", "tokens.max_caption_tokens=8"]
    one = cache_tokens(configured(world, world / f"{name}-one", *overrides))
    captions = Manifest.load(one).splits["train"].captions + Manifest.load(one).splits["val"].captions
    said = capfd.readouterr().out
    assert f"{captions} captions encoded by {name}; " in said and "longer than 8 tokens" in said
    again = world / f"{name}-two"
    if name == "minilm":
        said = cache_by_two(world, again, *overrides, "trainer.num_workers=1")
        assert "fork" not in said
        assert contents(again) == contents(one)
    else:
        cache_tokens(configured(world, again, *overrides))
    (again / "manifest.json").unlink()
    (again / "train" / "000001.tar").unlink()
    cache_tokens(configured(world, again, *overrides))
    assert contents(again) == contents(one)

    manifest = Manifest.load(one)
    assert manifest.text is not None and captions == 2 * COUNT // 3
    encoder = load_text_encoder(manifest.text)
    config = configured(world, one, *overrides)
    for split in ("train", "val"):
        source, reader, without = open_source(config.images, split), TokenReader(one, split), TokenReader(cached, split)
        positions = np.arange(len(reader))
        texts = [source.text(int(index)) for index in reader.source_indices]
        assert reader.texts(positions) == texts and 0 < sum(map(bool, texts)) < len(texts)
        batch = reader.read(positions, with_text=True)
        assert np.array_equal(batch["ids"], without.read(positions)["ids"]), "captions change no token"
        expected, cut = encoder.encode_counting(texts)
        assert manifest.splits[split].captions_cut == cut and (cut > 0 or split == "val")
        for text, states, row, length in zip(texts, expected, batch["text"], batch["text_length"], strict=True):
            assert length == (len(states) if text else 0) and not row[length:].any()
            assert np.allclose(row[:length], states[:length], atol=2e-3)
        assert np.allclose(reader.empty_caption(), encoder.encode_counting([""])[0][0], atol=2e-3)
    if name == "words":
        train = open_source(config.images, "train")
        rebuilt = build_text_encoder(config.tokens, (train.text(index) for index in range(len(train))))
        assert rebuilt is not None and manifest.text == rebuilt.spec


def test_without_any_caption_nothing_is_begun(world: Path, tmp_path: Path) -> None:
    for name in ("words", "minilm"):
        with pytest.raises(InputError, match=f"text_encoder={name}, but no training image has a caption"):
            cache_tokens(configured(world, tmp_path / name, f"tokens.text_encoder={name}"))
        assert not list((tmp_path / name).glob("*/*.tar*"))


def test_an_unreadable_caption_is_named_or_skipped(world: Path, captioned: Path, tmp_path: Path) -> None:
    shutil.copytree(captioned, tmp_path / "images")
    overrides = [f"images.path={tmp_path}/images", "tokens.text_encoder=words"]
    train = open_source(configured(world, tmp_path / "tokens", *overrides).images, "train")
    broken = next(train.key(index) for index in range(len(train)) if train.text(index))
    (tmp_path / "images" / broken).with_suffix(".txt").write_bytes(b"\xff\xff")
    with pytest.raises(CorruptImage, match=rf"{broken}: its caption .* cannot be read as UTF-8"):
        cache_tokens(configured(world, tmp_path / "tokens", *overrides))
    skipping = cache_tokens(configured(world, tmp_path / "tokens", *overrides, "images.skip_corrupt=true"))
    assert Manifest.load(skipping).splits["train"].skipped == 1


def test_captions_of_another_encoder_are_refused(world: Path, captioned: Path, tmp_path: Path) -> None:
    overrides = [f"images.path={captioned}", "tokens.text_encoder=words"]
    begun = cache_tokens(configured(world, tmp_path / "begun", *overrides))
    with pytest.raises(RunError, match="tokens.text_encoder: words, now minilm"):
        cache_tokens(configured(world, begun, overrides[0], "tokens.text_encoder=minilm"))
    (begun / "manifest.json").unlink()
    state = json.loads((begun / "state.json").read_bytes())
    (begun / "state.json").write_text(json.dumps({**state, "text": "0" * 64}))
    with pytest.raises(CacheError, match="captions of another text encoder.*make cache-tokens"):
        cache_tokens(configured(world, begun, *overrides))


def test_changed_captions_are_other_images(world: Path, captioned: Path, tmp_path: Path) -> None:
    shutil.copytree(captioned, tmp_path / "images")
    overrides = [f"images.path={tmp_path}/images"]
    cache_tokens(configured(world, tmp_path / "tokens", *overrides))
    next((tmp_path / "images").rglob("*.txt")).write_text("something else")
    with pytest.raises(CacheError, match="other images"):
        cache_tokens(configured(world, tmp_path / "tokens", *overrides))


@pytest.mark.parametrize("key", ["max_caption_tokens", "vocabulary_size"])
def test_caption_sizes_are_positive(world: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"tokens.{key}=0; allowed: 1 or more"):
        configured(world, tmp_path, f"tokens.{key}=0")
