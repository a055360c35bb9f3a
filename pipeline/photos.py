"""``octaves photos``: crops of colour photos out of ordinary packages, as webdataset shards.

What is notable here:

- the pictures come with Python and Debian packages, so no download page has to be reachable; of the Debian packages
  the files are unpacked into a temporary folder, nothing is installed;
- train and val are split by picture, and pictures of one shoot go together: two crops of one wall are no independent
  test;
- pictures are reduced by a whole factor (mean over pixels), which removes the traces of JPEG and of colour filters.
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
"""Mean of |dx| + |dy| in grey levels below which a crop counts as flat: sky, wall, blur."""


@dataclass
class PhotosConfig:
    """What to cut; every key can be given as key=value."""

    size: int = 64
    """Side of a crop in pixels."""
    reduce: int = 2
    """Whole factor by which pictures are made smaller before cutting."""
    flat_share: float = 0.75
    """Largest share of flat crops among those of one picture; the rest of them is left out."""
    val_share: float = 0.25
    """Share of the crops, as whole scenes, that is held out."""
    split_seed: int = 0
    """Seed of that split."""
    debs: str | None = None
    """Folder of .deb files that were fetched already; None: fetch them with apt-get where there is one."""
    out: str | None = None
    """Folder to write to; None: photos<size> under $OCTAVES_DATA."""


@dataclass
class Picture:
    """One photograph and where it comes from."""

    key: str
    """Package and path of the file in it."""
    scene: str
    """What the picture shares with others of the same place; pictures of one scene are on one side of the split."""
    path: Path
    license: str
    crops: list[tuple[int, int]] = field(default_factory=list)
    """(left, top) of each crop in the reduced picture."""


class PhotosError(OctavesError):
    """Photos that cannot be gathered; the message says what to do."""


def run_photos(overrides: Sequence[str]) -> None:
    """The command: ``key=value`` overrides of ``PhotosConfig``. Prints where the shards lie. Raises PhotosError."""
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
    """Gather, cut and write; a folder that is finished with the same settings is left as it is. Returns the folder.

    ``index.json`` comes last and lists settings, counts, and crops and licence of each picture. Raises PhotosError for
    a finished folder with other settings, for a value outside its range, and where no package with pictures is found.
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
            raise PhotosError(f"{out} was cut with other settings ({written}); delete it, or choose another out=")
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
    """The photographs of all packages that can be had; prints a line on each that cannot.

    Raises PhotosError when none can, or when there are too few pictures to hold some out.
    """
    count = 0
    for package in PACKAGES:
        root = debian_root(package, config.debs, scratch) if package.debian else package_root(package)
        if root is None:
            print(f"photos: goes on without {package.name}; to have it: {package.how_to_get}")
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
    """The unpacked files of a Debian package in ``scratch``, or None where it cannot be had. Needs no root."""
    if shutil.which("dpkg-deb") is None or (debs is None and shutil.which("apt-get") is None):
        return None
    folder = Path(debs).expanduser() if debs else scratch
    if debs is None:
        fetched = subprocess.run(
            ["apt-get", "download", "-q", package.name], cwd=scratch, capture_output=True, text=True, check=False
        )
        if fetched.returncode != 0:
            return None
    archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None)
    if archive is None:
        return None
    root = scratch / package.name
    subprocess.run(["dpkg-deb", "-x", str(archive.resolve()), str(root)], check=True)
    return root


def reduced(picture: Picture, factor: int) -> Image.Image:
    """The picture in RGB, every ``factor`` x ``factor`` pixels averaged to one. Raises CorruptImage."""
    image = decode(picture.path, picture.key).convert("RGB")
    return image.reduce(factor) if factor > 1 else image


def choose_crops(image: Image.Image, size: int, flat_share: float) -> list[tuple[int, int]]:
    """(left, top) of the crops of a picture: the whole grid that fits, less surplus flat ones.

    Of the flat crops as many stay as make up ``flat_share`` of the result, taken at even distances over the picture, so
    that sky and wall are seen but do not outweigh everything else.
    """
    columns, rows = image.width // size, image.height // size
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    places = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = (grey[top : top + size, left : left + size] for left, top in places)
    gradients = np.array(
        [np.abs(np.diff(tile, axis=0)).mean() + np.abs(np.diff(tile, axis=1)).mean() for tile in tiles]
    )
    flat = np.flatnonzero(gradients < FLAT_GRADIENT)
    textured = np.flatnonzero(gradients >= FLAT_GRADIENT)
    num_flat = min(len(flat), round(len(textured) * flat_share / (1 - flat_share)))
    kept_flat = flat[np.arange(num_flat) * len(flat) // max(num_flat, 1)]
    return [places[index] for index in sorted([*textured.tolist(), *kept_flat.tolist()])]


def split_pictures(pictures: list[Picture], val_share: float, seed: int) -> dict[str, list[Picture]]:
    """Whole scenes to each side: in the order of their hash they are held out while they fit the share of crops.

    Raises PhotosError when a side would be empty.
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
    """Shards of one side's crops (lossless webp, and json with picture, place and licence). Returns their number.

    Crops are written in the order of their hash: a folder read in order shows all pictures.
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
