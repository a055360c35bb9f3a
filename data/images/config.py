"""Config section ``images``: where images come from and how they are cropped."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ImagesConfig:
    """Images of a run, with pixels [channels, size, size]."""

    kind: str = "folder"
    """folder (class = subfolder), webdataset, fashion, demo, or photos."""
    path: str | None = None
    """Folder of images; or folder, brace pattern or URLs of shards. It contains train and val, or is split by
    val_share. None: the default folder of the dataset, where `make` puts it."""
    val_path: str | None = None
    """Validation images; None: a folder `val` beside `train` if there is one, otherwise a seeded split."""
    size: int = 32
    """Side in pixels."""
    channels: int = 3
    """3 for RGB, 1 for gray."""
    train_view: str = "center"
    """center (shorter side resized, center crop), random_resized_crop, random_crop (no resize), or pad (black border,
    no resize)."""
    eval_view: str = "center"
    """center or pad: the view for caching, evaluation and validation."""
    flip: bool = False
    """Mirror half of the training images; cached as a second view."""
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.0])
    """Area of a random_resized_crop as a range of fractions of the area of the largest square."""
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    """RGB (0-255) behind transparent pixels."""
    val_share: float = 0.1
    """Fraction of images for validation, for sources without their own split."""
    split_seed: int = 0
    """Seed of that split. It belongs to the data, not to the training."""
    max_corrupt_share: float = 0.01
    """Training skips unreadable images up to this fraction of the images read, then fails."""
    skip_corrupt: bool = False
    """Caching and evaluation skip unreadable images instead of failing; the manifest counts them."""
    skin_tones: bool = False
    """Only for the demo dataset: include icon variants with skin tones."""
