"""Where images come from and how they are cut: one config section, ``images``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ImagesConfig:
    """The images of a run. Pixels leave as [channels, size, size]."""

    kind: str = "folder"
    """folder (class = subfolder), webdataset, fashion, demo, or photos."""
    path: str | None = None
    """Folder of images; folder, brace pattern or URLs of shards. Has train and val below it, or is split by val_share.
    None: the place where `make` puts the set."""
    val_path: str | None = None
    """Held-out images; None: a folder `val` beside `train`, else a seeded split."""
    size: int = 32
    """Side in pixels."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    train_view: str = "center"
    """center (shorter side resized, middle cut), random_resized_crop, random_crop (no resize), or pad (black border,
    no resize)."""
    eval_view: str = "center"
    """center or pad: the view that is cached, evaluated and held out."""
    flip: bool = False
    """Mirror half of the training images; cached as a second view."""
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.0])
    """Range of the share of the largest square's area that random_resized_crop keeps."""
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    """RGB (0-255) behind transparent pixels."""
    val_share: float = 0.1
    """Share held out by a seeded split where the source has no split of its own."""
    split_seed: int = 0
    """Seed of that split; a part of the data, not of the training."""
    max_corrupt_share: float = 0.01
    """Training skips unreadable images up to this share of those tried, then fails."""
    skip_corrupt: bool = False
    """Caching and evaluation skip unreadable images instead of failing; the manifest counts them."""
    skin_tones: bool = False
    """Demo set only: also the variants of an icon with skin tones."""
