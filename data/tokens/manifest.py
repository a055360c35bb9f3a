"""The manifest of a token cache: its content, and the tokenizer and images it was made from.

It is written last, so a folder with a manifest is a complete cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import write_atomically
from data.layout import TokenLayout
from data.remote import RemoteError, attempt, is_remote, parts_of
from data.tokens.errors import CacheError
from data.tokens.shards import ShardInfo

FORMAT = "octaves-tokens"
SCHEMA = 1
FILE = "manifest.json"
MEND = "run `make cache-tokens` (python -m pipeline cache-tokens <your config>)"


@dataclass(frozen=True)
class SplitInfo:
    """One split of the cache."""

    count: int
    """Number of stored samples."""
    captions: int
    """Number of samples with a caption."""
    skipped: int
    """Number of unreadable images; the sidecars list their keys."""
    block_size: int
    """Samples in a full block."""
    source_fingerprint: str
    """``ImageSource.fingerprint`` of the images."""
    shards: tuple[ShardInfo, ...]
    captions_cut: int = 0
    """Number of captions that were too long for the text encoder."""
    remarks: dict[str, int] = field(default_factory=dict)
    """Sums of ``Tokens.remarks`` by name, e.g. clipped values or images of lower quality."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "shards": [shard.to_dict() for shard in self.shards]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SplitInfo:
        """The inverse of ``to_dict``. Raises TypeError or KeyError for invalid data."""
        return cls(**{**data, "shards": tuple(ShardInfo.from_dict(shard) for shard in data["shards"])})


@dataclass(frozen=True)
class Manifest:
    """Identity and content of a token cache."""

    tokenizer_sha256: str
    """sha256 of the tokenizer file."""
    tokenizer_kind: str
    tokenizer_config: dict[str, Any]
    layout: TokenLayout
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    channels: int
    views: tuple[str, ...]
    """Names along the views axis: identity, and flip if mirrored images are stored."""
    permutation_seed: int
    encode_batch_size: int
    precision: str
    class_names: tuple[str, ...]
    """Names in the order of the labels; empty for images without classes."""
    splits: dict[str, SplitInfo] = field(default_factory=dict)
    """train and val."""
    pixel_range: tuple[int, int] = (-1, 1)
    """Range of the pixels given to the tokenizer."""
    text: dict[str, Any] | None = None
    """Spec of the text encoder of the stored captions (``TextEncoder.spec``); None without encoded captions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with format and schema version."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            **asdict(self),
            "layout": self.layout.to_dict(),
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
        }

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` atomically, with a checksum of all its other entries."""
        data = self.to_dict()
        text = json.dumps({**data, "sha256": checksum(data)}, ensure_ascii=False, indent=1, sort_keys=True)
        write_atomically(folder / FILE, text.encode() + b"\n")

    @classmethod
    def load(cls, place: str | Path) -> Manifest:
        """The manifest of a cache in a folder or at a URL.

        Raises CacheError if it is missing, or if this version cannot read it.
        """
        return cls.parse(read_manifest(place), place)

    @classmethod
    def parse(cls, content: bytes, place: str | Path) -> Manifest:
        """The manifest from its bytes ``content``, read at ``place``. Raises CacheError if they are not valid."""
        path = f"{place}/{FILE}"
        try:
            data = json.loads(content)
        except ValueError as error:
            raise CacheError(f"{path} is truncated or no JSON ({error}); delete the folder and {MEND}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CacheError(f"{path} is not the manifest of a token cache")
        if data.get("schema") != SCHEMA:
            raise CacheError(
                f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}; delete the folder and {MEND}"
            )
        # old manifests have no checksum
        stored_checksum = data.pop("sha256", None)
        if stored_checksum is not None and stored_checksum != checksum(data):
            raise CacheError(f"{path} is damaged: its checksum is not the one that was written; delete it and {MEND}")
        values = {key: value for key, value in data.items() if key not in ("format", "schema")}
        try:
            for key in ("image_size", "views", "class_names", "pixel_range"):
                values[key] = tuple(values[key])
            values["layout"] = TokenLayout.from_dict(values["layout"])
            values["splits"] = {name: SplitInfo.from_dict(split) for name, split in values["splits"].items()}
            return cls(**values)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CacheError(
                f"{path}: entries are missing or foreign ({error}); delete the folder and {MEND}"
            ) from error

    def split(self, name: str) -> SplitInfo:
        """A split by name. Raises CacheError, which lists the splits, for an unknown name."""
        if name not in self.splits:
            raise CacheError(f"the cache has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def has_manifest(place: str | Path) -> bool:
    """True if a folder has a manifest. Always True for a URL, which is not checked."""
    return is_remote(str(place)) or (Path(place) / FILE).is_file()


def read_manifest(place: str | Path) -> bytes:
    """The manifest's bytes, from a folder or a URL. Raises CacheError."""
    if is_remote(str(place)):
        try:
            return attempt(lambda: b"".join(parts_of(f"{str(place).rstrip('/')}/{FILE}")))
        except RemoteError as error:
            raise CacheError(f"no token cache: {error}") from error
    path = Path(place) / FILE
    if not path.is_file():
        raise CacheError(f"{path} is missing: no complete token cache here; {MEND}")
    return path.read_bytes()


def checksum(data: dict[str, Any]) -> str:
    """Hex sha256 of the entries of a manifest, independent of JSON formatting and key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_belongs(manifest: Manifest, path: str | Path, found: str) -> None:
    """Raise CacheError if the tokens are not from the tokenizer at ``path``, whose sha256 is ``found``."""
    if found != manifest.tokenizer_sha256:
        raise CacheError(
            f"the token cache was made by another tokenizer ({manifest.tokenizer_sha256[:12]}) than {path} "
            f"({found[:12]}); delete the tokens folder and {MEND}"
        )
