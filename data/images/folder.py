"""Images in folders: the subfolder is the class; captions come from text files or from a listing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from data.images.captions import LISTINGS, TEXT_ENDING, caption_path, read_caption, read_listing
from data.images.config import ImagesConfig
from data.images.source import ImagesError, ImageSource, PackedStrings, Sample, decode, seeded_split, sha256_of

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderSource(ImageSource):
    """All images in a folder and its subfolders, sorted by path.

    The first subfolder is the class; images in the root have none. A folder without images is no class. The scan opens
    no file and reads no file size, so a million files take seconds. Folders and files whose names begin with a dot are
    ignored.

    The caption of `name.jpg` is the content of `name.txt` beside it, or comes from a listing `metadata.jsonl` or
    `metadata.csv` in the root (see ``read_listing``).

    ``class_names`` are the classes of the training folder, given for the validation folder.

    Raises ImagesError for a missing folder, a folder without images, a class that is not in ``class_names``, a listing
    that does not match the images, or captions of both kinds.
    """

    def __init__(self, root: Path, class_names: tuple[str, ...] | None = None) -> None:
        if not root.is_dir():
            raise ImagesError(f"{root}: no such folder; set images.path to a folder of images")
        files = sorted(walk(root))
        keys = [file for file in files if not file.endswith(TEXT_ENDING)]
        if not keys:
            raise ImagesError(f"{root} holds no images; accepted endings: {', '.join(ENDINGS)}")
        classes = [key.split("/", 1)[0] if "/" in key else None for key in keys]
        folder_classes = tuple(sorted({name for name in classes if name is not None}))
        foreign = set(folder_classes).difference(folder_classes if class_names is None else class_names)
        if foreign:
            raise ImagesError(f"{root}: the classes {', '.join(sorted(foreign))} are not among the training images")
        self.class_names = folder_classes if class_names is None else class_names
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.root = root
        self.keys = PackedStrings(keys)
        self.labels = np.array([-1 if name is None else numbers[name] for name in classes], dtype=np.int32)
        captions = read_listing(root, keys)
        self.listed = None if captions is None else PackedStrings(captions)
        text_files = {file for file in files if file.endswith(TEXT_ENDING)}
        # bool [n]: True for images with a text file beside them. Other text files, such as a license, are ignored.
        self.beside = np.array([bool(text_files) and caption_path(key) in text_files for key in keys])
        if self.listed is not None and self.beside.any():
            example = caption_path(keys[int(self.beside.argmax())])
            raise ImagesError(
                f"{root} has captions in {' or '.join(LISTINGS)} and in {int(self.beside.sum())} text files beside "
                f"images, such as {example}; keep one kind"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        return Sample(decode(self.root / key, key), int(self.labels[index]), self.text(index), key)

    def key(self, index: int) -> str:
        return self.keys[index]

    def text(self, index: int) -> str:
        if self.listed is not None:
            return self.listed[index]
        return read_caption(self.root, self.key(index)) if self.beside[index] else ""

    def fingerprint(self) -> str:
        """sha256 over names, sizes and captions. Only this method reads file sizes."""
        sizes = np.array([os.stat(self.root / key).st_size for key in self.keys], dtype=np.int64)
        parts = [*(part.tobytes() for part in self.keys.arrays), sizes.tobytes()]
        if self.listed is not None:
            parts += [part.tobytes() for part in self.listed.arrays]
        elif self.beside.any():
            # The content of captions is hashed, not their size, which may stay the same when a word changes.
            contents = ((self.root / caption_path(self.key(int(i)))).read_bytes() for i in np.flatnonzero(self.beside))
            return sha256_of(chain(parts, [self.beside.tobytes()], contents))
        return sha256_of(parts)


def walk(root: Path, below: str = "") -> Iterator[str]:
    """Paths of images and text files relative to ``root``, with forward slashes, unsorted."""
    with os.scandir(root / below) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(ENDINGS):
                yield below + entry.name
            elif entry.is_dir():
                yield from walk(root, f"{below}{entry.name}/")
            elif entry.name.endswith(TEXT_ENDING):
                yield below + entry.name


def split_roots(path: Path, val_path: str | None) -> tuple[Path, Path | None]:
    """Folders of the training and the validation images; None for the latter if the training images are to be split.

    The validation folder is ``val_path``, or a folder `val` beside `train`. ``path`` either contains `train` or is the
    folder `train`.
    """
    train, val = path, None
    if (path / "train").is_dir() and (path / "val").is_dir():
        train, val = path / "train", path / "val"
    elif path.name == "train" and (path.parent / "val").is_dir():
        val = path.parent / "val"
    return train, Path(val_path).expanduser() if val_path else val


def open_folder(config: ImagesConfig, split: Literal["train", "val"]) -> ImageSource:
    """One split of the images in ``config.path``. Raises ImagesError without a path, and errors of ``FolderSource``."""
    if not config.path:
        raise ImagesError("images.kind=folder needs images.path=<folder of images>")
    train_root, val_root = split_roots(Path(config.path).expanduser(), config.val_path)
    train = FolderSource(train_root)
    if val_root is None:
        return seeded_split(train, split, config.val_share, config.split_seed)
    return train if split == "train" else FolderSource(val_root, train.class_names)
