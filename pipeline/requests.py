"""Inputs and outputs of sample, upsample, colorize and edit: parse prompts, find images, save pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from data.images.config import ImagesConfig
from data.images.folder import ENDINGS
from data.images.source import decode
from data.images.views import picture_to_pixels, pixels_to_picture, plain_image
from pipeline.errors import RunError
from pipeline.models import Models
from pipeline.own_keys import Request
from stages.contract import Prior, Prompts


@dataclass(frozen=True)
class Asked:
    """One prompt in plain words."""

    label: int
    """-1 for no class."""
    text: str
    """Empty for no caption."""
    name: str
    """Name to display: caption and class name, or one of them; empty without both."""

    @classmethod
    def of(cls, label: int, text: str, class_names: Sequence[str]) -> Asked:
        """Make a prompt of a class id (-1: none) and a caption (empty: none)."""
        parts = (text, class_names[label] if label >= 0 else "")
        return cls(label, text, ", ".join(part for part in parts if part))

    @property
    def file_name(self) -> str:
        """The name for use in file names: letters, digits and ``_``, at most 80 bytes; ``sample`` without a name."""
        safe_name = "".join(letter if letter.isalnum() else "_" for letter in self.name)
        return safe_name.encode()[:80].decode(errors="ignore") or "sample"


def parse_prompts(request: Request, prior: Prior, every_class: bool = True) -> list[Asked]:
    """All combinations of the captions and classes of a request. Without both: all classes if ``every_class``.

    Raises RunError for classes or captions that the prior does not support, and for a count below 1.
    """
    if request.count < 1:
        raise RunError(f"count={request.count}; allowed: 1 or more")
    classes = request.classes.split(",") if request.classes else []
    return ask(prior, classes, request.text.split("|") if request.text else [], every_class)


def ask(prior: Prior, classes: Sequence[str | int], texts: Sequence[str], every_class: bool = True) -> list[Asked]:
    """All combinations of captions and classes (names or ids). Without both: all classes if ``every_class``.

    Raises RunError for classes or captions that the prior does not support.
    """
    texts = checked_texts(texts, prior.condition.uses_text)
    names = known_classes(prior)
    by_class = bool(classes) or (every_class and not texts)
    labels = class_ids(classes, names) if by_class else [-1]
    return [Asked.of(label, text, names) for text in texts or [""] for label in labels]


def known_classes(prior: Prior) -> list[str]:
    """Names of the classes that a prior accepts; empty if it does not use classes."""
    return prior.class_names if prior.condition.uses_labels else []


def to_prompts(models: Models, asked: Sequence[Asked]) -> Prompts:
    """Convert prompts to the input of the prior, one per sample."""
    return models.prompts([one.label for one in asked], [one.text for one in asked])


def checked_texts(texts: Sequence[str], known: bool) -> list[str]:
    """Captions without surrounding white space. Raises RunError if the prior uses none, and for an empty one."""
    if texts and not known:
        raise RunError(
            "text= is given, but this prior was trained without captions; leave it out, or train one with "
            "condition.kind=text"
        )
    texts = [text.strip() for text in texts]
    if not all(texts):
        raise RunError("text= contains an empty caption; leave text= out to sample without captions")
    return texts


def class_ids(classes: Sequence[str | int], names: list[str]) -> list[int]:
    """Convert class names or ids to class ids. Without any: all classes, or [-1] if the prior has no classes.

    Raises RunError for an unknown class.
    """
    if not names:
        if classes:
            raise RunError(f"classes={classes[0]}: this prior was trained without classes; leave it out")
        return [-1]
    if not classes:
        return list(range(len(names)))
    ids = []
    for part in (part.strip() if isinstance(part, str) else part for part in classes):
        if part in names:
            ids.append(names.index(str(part)))
        elif str(part).isdecimal() and int(part) < len(names):
            ids.append(int(part))
        else:
            raise RunError(f"classes={part}; allowed: 0 to {len(names) - 1}, or {', '.join(names[:20])}")
    return ids


def parse_numbers(text: str, key: str, kind: type[int] | type[float] = int) -> list:
    """Parse comma-separated numbers. Raises RunError, naming the key."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise RunError(f"{key}={text}; allowed: comma-separated numbers") from error


def find_inputs(path: str) -> list[Path]:
    """The image at a path, or all images directly in a folder, sorted by name.

    Raises RunError if there is none, or if two differ only in their extension, because results are named without it.
    """
    if not path:
        raise RunError("input= is missing: give an image, or a folder of images")
    given = Path(path).expanduser()
    if given.is_dir():
        images = sorted(file for file in given.iterdir() if file.name.lower().endswith(ENDINGS))
        if not images:
            raise RunError(f"{given} contains no images; allowed file extensions: {', '.join(ENDINGS)}")
        for first, second in pairwise(sorted(images, key=lambda file: file.stem)):
            if first.stem == second.stem:
                raise RunError(
                    f"{given} contains {first.name} and {second.name}, whose results would have the same name; "
                    "rename one of them"
                )
        return images
    if not given.is_file():
        raise RunError(f"input={path}: no such image or folder")
    return [given]


def read_plain(path: Path, images: ImagesConfig) -> Tensor:
    """Read an image at its own size as uint8 [channels, h, w]. Raises CorruptImage."""
    return picture_to_pixels(plain_image(decode(path, str(path)), images.channels, images.background))


def save_pictures(folder: Path, names: list[str], pictures: Tensor) -> None:
    """Write images uint8 [N, C, h, w] as RGB PNGs, gray images too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, pictures, strict=True):
        pixels_to_picture(picture).convert("RGB").save(folder / f"{name}.png")
