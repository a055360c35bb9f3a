"""Captions of images in a folder: a text file beside each image, or one listing for all.

A listing must describe exactly the images of its folder. A mismatch usually means that listing and images are of
different versions, and captions of wrong images would go unnoticed later.
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.images.source import CorruptImage, ImagesError

TEXT_ENDING = ".txt"
LISTINGS = ("metadata.jsonl", "metadata.csv")
"""File names of a listing, as in the imagefolder format of Hugging Face."""
CAPTION_KEYS = ("text", "caption")


def clean(text: str) -> str:
    """A caption without surrounding white space and without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def caption_of(record: dict[str, Any]) -> str:
    """The caption of a record, under ``text`` or ``caption``; empty for none. Raises ValueError for a list or dict."""
    text = record.get("text") or record.get("caption") or ""
    if isinstance(text, list | dict):
        raise ValueError(f"a caption that is a JSON {'list' if isinstance(text, list) else 'object'}; give it as text")
    return clean(str(text))


def caption_path(key: str) -> str:
    """Path of the caption file for the image ``key``; the file may not exist."""
    return posixpath.splitext(key)[0] + TEXT_ENDING


def read_caption(root: Path, key: str) -> str:
    """The caption in the text file of the image ``key``. Raises CorruptImage, naming both, if it is not UTF-8 text."""
    name = caption_path(key)
    try:
        return clean((root / name).read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptImage(key, f"its caption {root / name} cannot be read as UTF-8 text ({error})") from error


def read_listing(root: Path, keys: Sequence[str]) -> list[str] | None:
    """The captions of the images ``keys`` from the listing in ``root``; None without a listing or without captions.

    Each entry has ``file_name``, relative to ``root``, and ``text`` or ``caption``.

    Raises ImagesError if the listing cannot be read or does not name each of these images exactly once.
    """
    paths = [root / name for name in LISTINGS if (root / name).is_file()]
    if not paths:
        return None
    if len(paths) > 1:
        raise ImagesError(f"{root} has {' and '.join(LISTINGS)}; keep one of them")
    path = paths[0]
    captions: dict[str, str] = {}
    has_captions = False
    for line, entry in read_entries(path):
        has_captions |= any(name in entry for name in CAPTION_KEYS)
        try:
            caption = caption_of(entry)
        except ValueError as error:
            raise ImagesError(f"{path}, line {line}: {error}") from error
        name = posixpath.normpath(str(entry.get("file_name") or ""))
        if name == ".":
            if caption:
                raise ImagesError(f"{path}, line {line}: a caption without file_name; each entry needs one")
            continue
        if name in captions:
            raise ImagesError(f"{path}, line {line}: {name} is listed twice; give each image one entry")
        captions[name] = caption
    if not has_captions:
        return None
    present = set(keys)
    foreign = [name for name in captions if name not in present]
    missing = [key for key in keys if key not in captions]
    if foreign or missing:
        mismatch = (
            f"{len(foreign)} of them name no image there, such as {foreign[0]}"
            if foreign
            else f"{len(missing)} images have none, such as {missing[0]}"
        )
        raise ImagesError(
            f"{path} has {len(captions)} entries for {len(keys)} images: {mismatch}; give each image one entry"
        )
    return [captions[key] for key in keys]


def read_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, entry) of a listing in JSON lines or CSV. Raises ImagesError that names the line."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    line = reader.line_num
                    if None in row:
                        raise ImagesError(
                            f"{path}, line {line}: more columns than the header has; put captions with commas in quotes"
                        )
                    yield line, row
                return
            for line, content in enumerate(file, start=1):
                if content.strip():
                    entry = json.loads(content)
                    if not isinstance(entry, dict):
                        raise ImagesError(f"{path}, line {line}: no JSON object")
                    yield line, entry
    except (ValueError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError
        raise ImagesError(f"{path} cannot be read after line {line}: {error}") from error
