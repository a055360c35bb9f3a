"""``images.kind`` picks the source: one line a kind."""

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
    """Whether the images of a kind lie in memory once they are open: then nothing is gained by loading them ahead."""
    return bool(getattr(SOURCES.get(kind), "small", False))


def open_source(config: ImagesConfig, split: Literal["train", "val"]) -> ImageSource:
    """The training or held-out images of a config.

    Raises ImagesError for an unknown kind, and what the source itself raises when its files are missing: the message
    says where it looked and what to do.
    """
    if config.kind not in SOURCES:
        raise ImagesError(f"images.kind={config.kind!r}; allowed: {', '.join(SOURCES)}")
    return SOURCES[config.kind](config, split)
