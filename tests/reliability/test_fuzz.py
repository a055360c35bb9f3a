"""Readers of what a user may be handed: whatever the bytes, they read it or raise an OctavesError."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import OctavesError
from data.files import file_sha256
from data.tokens.manifest import Manifest, checksum
from data.tokens.reader import TokenReader
from pipeline.config import load_config
from stages.weights import load_prior, load_tokenizer

EXAMPLES = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.just(2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["", "sit", "fixed", "grammar", "none", "../x", "é\ud800", "${run}", "!!python/object:os.system"])
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of plain data stand."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(below for key, value in items for below in places(value, (*path, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The data with another value at a place; ``...`` takes the place away."""
    if not path:
        return None if value is ... else value
    key, *rest = path
    copy = dict(data) if isinstance(data, dict) else list(data)
    if not rest and value is ...:
        del copy[key]
    else:
        copy[key] = changed(copy[key], tuple(rest), value)
    return copy


@st.composite
def mutations(draw: st.DrawFn, data: Any) -> Any:
    """Plain data with one to three values changed or taken away."""
    for _ in range(draw(st.integers(1, 3))):
        data = changed(data, draw(st.sampled_from(places(data))), draw(JSON | st.just(...)))
    return data


def read(reader: Any, *arguments: Any) -> None:
    try:
        reader(*arguments)
    except OctavesError as error:
        assert str(error)


def read_all(folder: Path) -> None:
    reader = TokenReader(folder, "train")
    for position in range(len(reader)):
        reader.read([position])
        reader.keys([position])
        reader.texts([position])


@pytest.fixture
def cache(tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished / "run/tokens", tmp_path / "tokens"))


@EXAMPLES
@given(st.data())
def test_manifest(cache: Path, finished: Path, data: st.DataObject) -> None:
    """Random entries of a manifest: read, or one line."""
    whole = json.loads((finished / "run/tokens/manifest.json").read_bytes())
    del whole["sha256"]
    foreign = data.draw(mutations(whole))
    if isinstance(foreign, dict) and data.draw(st.booleans()):
        foreign["sha256"] = checksum(foreign)
    (cache / "manifest.json").write_text(json.dumps(foreign))
    read(read_all, cache)


@EXAMPLES
@given(st.binary(max_size=200))
def test_manifest_of_any_bytes(cache: Path, content: bytes) -> None:
    """Random bytes as a manifest: read, or one line."""
    (cache / "manifest.json").write_bytes(content)
    read(read_all, cache)


@EXAMPLES
@given(st.data())
def test_shard(cache: Path, finished: Path, data: st.DataObject) -> None:
    """Random bytes and members of a shard that the manifest believes: read, or one line."""
    path = cache / "train/000000.tar"
    whole = finished / "run/tokens/train/000000.tar"
    if data.draw(st.booleans()):
        content = bytearray(whole.read_bytes())
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
    else:
        with tarfile.open(whole) as old, tarfile.open(path, "w") as new:
            for member in old:
                file = old.extractfile(member)
                assert file is not None
                held = file.read()
                match data.draw(st.sampled_from(["kept", "kept", "kept", "left out", "cut", "other", "renamed"])):
                    case "left out":
                        continue
                    case "cut":
                        held = held[: data.draw(st.integers(0, len(held)))]
                    case "other":
                        held = data.draw(st.binary(max_size=200))
                    case "renamed":
                        member.name = data.draw(st.sampled_from(["../../x.npy", "00000000.label.npy", "a", ".", "x.y"]))
                member.size = len(held)
                new.addfile(member, io.BytesIO(held))
    manifest = Manifest.load(finished / "run/tokens")
    split = manifest.splits["train"]
    shards = (replace(split.shards[0], bytes=path.stat().st_size, sha256=file_sha256(path)), *split.shards[1:])
    replace(manifest, splits={**manifest.splits, "train": replace(split, shards=shards)}).save(cache)
    read(read_all, cache)


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
@EXAMPLES
@given(data=st.data())
def test_weights_metadata(tmp_path: Path, finished: Path, part: str, data: st.DataObject) -> None:
    """Random metadata of weights: read, or one line."""
    content = (finished / f"run/{part}/{part}.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    told = header["__metadata__"]
    told.pop("sha256")
    told["octaves"] = json.dumps(data.draw(mutations(json.loads(told["octaves"]))))
    text = json.dumps(header).encode()
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    read({"tokenizer": load_tokenizer, "prior": load_prior}[part], path)


@pytest.mark.parametrize("part", ["tokenizer", "prior"])
@EXAMPLES
@given(data=st.data())
def test_weights_of_any_bytes(tmp_path: Path, finished: Path, part: str, data: st.DataObject) -> None:
    """Random bytes in a weights file: read, or one line."""
    content = bytearray((finished / f"run/{part}/{part}.safetensors").read_bytes())
    for at in data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content[: data.draw(st.sampled_from([7, 100, len(content) - 1, len(content)]))])
    read({"tokenizer": load_tokenizer, "prior": load_prior}[part], path)


@EXAMPLES
@given(st.data())
def test_config(tmp_path: Path, tiny: Path, data: st.DataObject) -> None:
    """Random entries of a config: read, or one line."""
    path = tmp_path / "foreign.yaml"
    path.write_text(yaml.safe_dump(data.draw(mutations(yaml.safe_load(tiny.read_text()))), allow_unicode=True))
    read(load_config, path)


@EXAMPLES
@given(st.binary(max_size=100) | st.text(alphabet="{}[]:!&*-|>%@`$?, \n'\"#ab1", max_size=40).map(str.encode))
def test_config_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    """Random text and bytes as a config: read, or one line."""
    (tmp_path / "foreign.yaml").write_bytes(content)
    read(load_config, tmp_path / "foreign.yaml")


SECTIONS = st.sampled_from(["tokenizer", "prior", "images", "tokens", "seed", "run", "tokenizer.quantizer", "x"])
KEYS = st.sampled_from(["", ".kind", ".size", ".depth", ".encoder.width", "[0]", ".", "..", ".quantizer"])
VALUES = st.sampled_from(
    ["sit", "1", "-1", "1e400", "null", "[1,2]", "{a: 1}", "${run}", "${oc.env:HOME}", "${", "???"]
)


@EXAMPLES
@given(st.lists(st.builds("{}{}={}".format, SECTIONS, KEYS, VALUES | st.text(max_size=8)), min_size=1, max_size=3))
def test_overrides(tiny: Path, overrides: list[str]) -> None:
    """Random overrides: read, or one line."""
    read(load_config, tiny, overrides)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {}']", "name: !!python/object/apply:os.system ['touch {}']"]
)
def test_a_config_runs_nothing(tmp_path: Path, text: str) -> None:
    """A YAML that asks for code to be run: it is not."""
    path = tmp_path / "foreign.yaml"
    path.write_text(text.format(tmp_path / "ran"))
    read(load_config, path)
    assert not (tmp_path / "ran").exists()
