"""Registry of image sources by ``images.kind``."""

from __future__ import annotations

from typing import Literal

from data.images.config import ImagesConfig
from data.images.demo import DemoSource
from data.images.fashion import FashionSource
from data.images.folder import open_folder
from data.images.shards import open_photos, open_shards
from data.images.source import ImagesError, ImageSource

SOURCES = {
    "folder": open_folder,
    "webdataset": open_shards,
    "fashion": FashionSource,
    "demo": DemoSource,
    "photos": open_photos,
}


def lies_in_memory(kind: str) -> bool:
    """True if the source of this kind keeps its images in memory, so loader workers bring no speed."""
    return bool(getattr(SOURCES.get(kind), "small", False))


def open_source(config: ImagesConfig, split: Literal["train", "val"]) -> ImageSource:
    """The training or validation images of a config.

    Raises ImagesError for an unknown kind, and the errors of the source, e.g. for missing files; the message says where
    it looked and what to do.
    """
    if config.kind not in SOURCES:
        raise ImagesError(f"images.kind={config.kind!r}; allowed: {', '.join(SOURCES)}")
    return SOURCES[config.kind](config, split)
