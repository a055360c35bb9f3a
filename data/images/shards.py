"""Random access to images in webdataset shards.

Notes:

- The headers of each tar are scanned once, and the offsets of its members are cached in ``$OCTAVES_DATA/indexes``. So
  reading a sample is one ``pread``: this allows any order and exact resume, and shards need not be split evenly between
  ranks and workers.
- Nothing is unpickled: only the image, ``cls``, ``txt`` and ``json`` of a record are read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from braceexpand import braceexpand

from data.images.captions import caption_of, clean
from data.images.config import ImagesConfig
from data.images.folder import split_roots
from data.images.home import data_home
from data.images.remote import local_copy
from data.images.source import (
    CorruptImage,
    ImagesError,
    ImageSource,
    PackedStrings,
    Sample,
    decode,
    seeded_split,
    sha256_of,
)
from data.remote import is_remote

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
TEXT_ENDINGS = ("txt", "json")
INDEX_VERSION = 1
MAX_OPEN_SHARDS = 64


class ShardSource(ImageSource):
    """Records with an image from tar shards, in the order of shards and members.

    ``cls`` (or ``label`` in ``json``) is the class, ``txt`` (or ``text`` or ``caption`` in ``json``) the caption. Class
    names come from ``classes.txt`` beside the shards, one name per line; without it they are numbers.

    Raises ImagesError if a shard is no complete tar, a class is no number or has no name, or no record has an image.
    """

    def __init__(self, shards: list[Path], class_names: tuple[str, ...] | None = None) -> None:
        self.shards = shards
        indexes = [shard_index(shard) for shard in shards]
        self.keys = PackedStrings(
            f"{shard.stem}/{key}"
            for shard, index in zip(shards, indexes, strict=True)
            for key in PackedStrings(packed=(index["key_bytes"], index["key_borders"]))
        )
        if not self.keys:
            raise ImagesError(
                f"no record with an image in {shards[0]} … ({len(shards)} shards); "
                f"accepted endings: {', '.join(IMAGE_ENDINGS)}"
            )
        self.shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(index["label"]) for index in indexes])
        # Columns: offset and size of the image, offset and size of the text, 1 if the text is JSON.
        self.places = np.concatenate([index["places"] for index in indexes])
        self.labels = np.concatenate([index["label"] for index in indexes])
        num_classes = int(self.labels.max()) + 1
        self.class_names = read_class_names(shards[0].parent, num_classes) if class_names is None else class_names
        if num_classes > len(self.class_names):
            raise ImagesError(
                f"{shards[0].parent}: class {num_classes - 1} is beyond the {len(self.class_names)} known classes; "
                "list all classes in classes.txt beside the training shards"
            )
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        offset, size = (int(value) for value in self.places[index, :2])
        image = decode(self._read(index, offset, size), key)
        return Sample(image, int(self.labels[index]), self.text(index), key)

    def key(self, index: int) -> str:
        return self.keys[index]

    def text(self, index: int) -> str:
        offset, size, is_json = (int(value) for value in self.places[index, 2:])
        text = self._read(index, offset, size).decode("utf-8", "replace") if size else ""
        if not is_json:
            return clean(text)
        try:
            return caption_of(parse_json(text, self.key(index)))
        except ValueError as error:
            raise CorruptImage(self.key(index), f"its json: {error}") from error

    def fingerprint(self) -> str:
        parts = [part.tobytes() for part in self.keys.arrays]
        return sha256_of([*parts, self.places.tobytes(), self.labels.tobytes()])

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Bytes of a member. ``pread`` does not move the file position, so forked workers can share a file."""
        shard = int(self.shard_of[index])
        try:
            if shard not in self._open:
                while len(self._open) >= MAX_OPEN_SHARDS:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
            return os.pread(self._open[shard], size, offset)
        except OSError as error:
            raise CorruptImage(self.key(index), str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def read_class_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    """The lines of ``classes.txt``, or the class numbers as names."""
    listing = folder / "classes.txt"
    if listing.is_file():
        lines = listing.read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    return tuple(str(number) for number in range(num_classes))


def parse_json(text: str, key: str) -> dict[str, Any]:
    """The object in a ``json`` member. Raises CorruptImage if it is not a JSON object: the record is damaged."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CorruptImage(key, f"its json: {error}") from error
    if not isinstance(record, dict):
        raise CorruptImage(key, "its json is no JSON object")
    return record


def shard_index(shard: Path) -> dict[str, np.ndarray]:
    """Keys, offsets and labels of the records of a shard, from the cached index or by a scan.

    The cached index is valid for one (path, size, modification time). Raises the errors of ``scan_shard``.
    """
    stat = shard.stat()
    identity = f"{INDEX_VERSION} {shard.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    path = data_home() / "indexes" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    index = scan_shard(shard)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, allow_pickle=False, **index)
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"the index of {shard} cannot be cached, so it is scanned each time: {error}", stacklevel=2)
    return index


def scan_shard(shard: Path) -> dict[str, np.ndarray]:
    """Build the index of a shard from its headers: ``key_bytes``, ``key_borders``, ``places``, ``label``.

    Raises ImagesError for a damaged or compressed tar and for a class that is no number.
    """
    keys: list[str] = []
    places: list[tuple[int, int, int, int, int]] = []
    labels: list[int] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in records(tar):
                image = next((members[ending] for ending in IMAGE_ENDINGS if ending in members), None)
                if image is None:
                    continue
                text = next((members[ending] for ending in TEXT_ENDINGS if ending in members), None)
                keys.append(key)
                places.append(
                    (
                        image.offset_data,
                        image.size,
                        text.offset_data if text else 0,
                        text.size if text else 0,
                        int("txt" not in members and "json" in members),
                    )
                )
                labels.append(label_of(tar, members, f"{shard}: {key}"))
    except tarfile.TarError as error:
        raise ImagesError(f"{shard} is no complete, uncompressed tar ({error}); write it again") from error
    key_bytes, key_borders = PackedStrings(keys).arrays
    return {
        "key_bytes": key_bytes,
        "key_borders": key_borders,
        "places": np.array(places, dtype=np.int64).reshape(-1, 5),
        "label": np.array(labels, dtype=np.int64),
    }


def records(tar: tarfile.TarFile) -> Iterable[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, members by extension) of each record.

    A record is a run of members with the same name up to the first dot, as in webdataset.
    """
    current_key = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current_key and members:
            yield current_key, members
            members = {}
        current_key = key
        members[ending.lower()] = member
    if members:
        yield current_key, members


def label_of(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], key: str) -> int:
    """The class of a record, -1 for none. Raises ImagesError if it is no number."""
    ending = next((name for name in ("cls", "json") if name in members), None)
    if ending is None:
        return -1
    file = tar.extractfile(members[ending])
    assert file is not None
    content = file.read()
    try:
        if ending == "cls":
            return max(-1, int(content))
        record = json.loads(content)
        return max(-1, int(record.get("label", -1)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ImagesError(f"{key}.{ending} gives no class number: {content[:40]!r}") from error


def find_shards(pattern: str | Path) -> list[Path]:
    """Shards of a folder (every .tar in it), of a pattern with braces, ``*`` or ``?``, or of URLs with braces.

    Shards at URLs are downloaded. Raises ImagesError, which names a missing shard.
    """
    if is_remote(str(pattern)):
        return [local_copy(url) for url in braceexpand(str(pattern))]
    path = Path(pattern).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
    else:
        names = [name for part in braceexpand(str(path)) for name in (sorted(glob.glob(part)) or [part])]
        shards = [Path(name) for name in names]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        missing_names = (
            f"{missing[0]} (and {len(missing) - 1} more)" if len(missing) > 1 else str(missing[0] if missing else path)
        )
        raise ImagesError(
            f"no shards at {missing_names}; give a folder of .tar files or a pattern such as shard-{{000..009}}.tar"
        )
    return shards


def open_shards(config: ImagesConfig, split: Literal["train", "val"]) -> ImageSource:
    """One split of the shards at ``config.path``. Raises ImagesError without a path, and errors of ``ShardSource``."""
    if not config.path:
        raise ImagesError("images.kind=webdataset needs images.path=<folder or pattern of .tar shards>")
    train_root: str | Path = config.path
    val_root: str | Path | None = config.val_path
    if not is_remote(config.path):
        train_root, sibling_val = split_roots(Path(config.path).expanduser(), None)
        val_root = val_root or sibling_val
    train = ShardSource(find_shards(train_root))
    if val_root is None:
        return seeded_split(train, split, config.val_share, config.split_seed)
    return train if split == "train" else ShardSource(find_shards(val_root), train.class_names)


def open_photos(config: ImagesConfig, split: Literal["train", "val"]) -> ImageSource:
    """One split of the crops from `make photos`. ``path`` is a folder, or a name inside $OCTAVES_DATA.

    Raises ImagesError, which says what to do, if there are no crops.
    """
    folder = photos_folder(config)
    if not (folder / "index.json").is_file():
        size = re.fullmatch(r"photos(\d+)", folder.name)
        raise ImagesError(
            f"no photo crops at {folder}; create them with `octaves photos size={size[1] if size else config.size}`"
        )
    return ShardSource(find_shards(folder / split))


def photos_folder(config: ImagesConfig) -> Path:
    """The folder of the crops, which may not exist yet. Its ``index.json`` lists the source picture of each crop."""
    name = config.path or f"photos{config.size}"
    folder = Path(name).expanduser()
    return folder if config.path and (folder / "index.json").is_file() else data_home() / name
