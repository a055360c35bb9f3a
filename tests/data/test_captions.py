"""Captions: their sources, the errors for captions that do not fit, and no cost for images without captions."""

import json
import os
from pathlib import Path

import pytest

from data.images import folder as folder_module
from data.images.config import ImagesConfig
from data.images.demo import SKIN_TONES
from data.images.folder import FolderSource
from data.images.shards import ShardSource
from data.images.source import CorruptImage, ImagesError, ImageSource
from data.images.sources import open_source
from tests.data.test_images_sources import encoded, write_files, write_tar


@pytest.fixture(autouse=True)
def own_data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored shard indexes belong to one test."""
    monkeypatch.setenv("OCTAVES_DATA", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def sides() -> list[ImageSource]:
    """Both sides of the demo set with skin tones."""
    return [open_source(ImagesConfig(kind="demo", skin_tones=True), split) for split in ("train", "val")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images, one of them without a class."""
    write_files(tmp_path / "images", "cat/a.png cat/b.jpg dog/c.png d.png")
    return tmp_path / "images"


def texts(source: ImageSource) -> dict[str, str]:
    """Captions by name; ``text`` and ``__getitem__`` give the same."""
    found = {source.key(index): source.text(index) for index in range(len(source))}
    assert list(found.values()) == [source[index].text for index in range(len(source))]
    return found


NONE = {"cat/a.png": "", "cat/b.jpg": "", "d.png": "", "dog/c.png": ""}
LISTED = {"cat/a.png": "a cat, small", "cat/b.jpg": "", "d.png": "größer 😀", "dog/c.png": 'a "dog"'}


def test_text_files_beside_images_are_captions(images: Path) -> None:
    assert texts(FolderSource(images)) == NONE
    (images / "cat" / "a.txt").write_bytes("\ufeffein Kätzchen 🐈\r\n".encode())
    (images / "d.txt").write_text("  ")
    (images / "README.txt").write_text("no caption of any image")
    (images / "notes").mkdir()
    (images / "notes" / "a.txt").write_text("no caption, and its folder is no class")
    source = FolderSource(images)
    assert texts(source) == {**NONE, "cat/a.png": "ein Kätzchen 🐈"} and source.class_names == ("cat", "dog")
    sides = [open_source(ImagesConfig(path=str(images), val_share=0.5), split) for split in ("train", "val")]
    assert texts(sides[0]) | texts(sides[1]) == texts(source)


@pytest.mark.parametrize("key", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_listing_in_the_root_gives_captions(images: Path, kind: str, key: str) -> None:
    if kind == "jsonl":
        entries = [json.dumps({"file_name": name, key: text or None, "id": 3}) for name, text in LISTED.items()]
        (images / "metadata.jsonl").write_text("\n".join(reversed(entries)) + "\n\n", encoding="utf-8")
    else:
        quoted = [f'./{name},"{text.replace(chr(34), chr(34) * 2)}",3' for name, text in LISTED.items()]
        (images / "metadata.csv").write_text("\r\n".join([f"file_name,{key},id", *quoted]), encoding="utf-8-sig")
    assert texts(FolderSource(images)) == LISTED


def test_a_listing_without_captions_is_no_matter(images: Path) -> None:
    (images / "metadata.csv").write_text("file_name,label\nelsewhere.png,3\n")
    assert texts(FolderSource(images)) == NONE


def lines(entries: dict) -> str:
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in entries.items())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"metadata.jsonl": lines({**LISTED, "cat/x.png": "x"})}, "5 entries for 4 images.*such as cat/x.png"),
        ({"metadata.jsonl": lines({"cat/a.png": "a", "d.png": "d"})}, "2 entries for 4 images.*such as cat/b.jpg"),
        ({"metadata.jsonl": lines(LISTED) + lines({"d.png": "again"})}, "line 5: d.png is listed twice"),
        ({"metadata.jsonl": '{"text": "of what?"}\n'}, "line 1: a caption without file_name"),
        ({"metadata.jsonl": lines(LISTED) + "[1]\n"}, "line 5: no JSON object"),
        ({"metadata.jsonl": lines({**LISTED, "d.png": ["a", "b"]})}, "line 3: a caption that is a JSON list; give it"),
        ({"metadata.jsonl": lines(LISTED) + "{\n"}, "metadata.jsonl cannot be read after line 5"),
        ({"metadata.csv": "file_name,text\ncat/a.png,a cat, small\n"}, "line 2: more columns.*quotes"),
        ({"metadata.csv": b"file_name,text\ncat/a.png,\xff\xfe\n"}, "metadata.csv cannot be read.*utf-8"),
        ({"metadata.csv": "file_name,text\n", "metadata.jsonl": ""}, "keep one of them"),
        ({"metadata.jsonl": lines(LISTED), "cat/a.txt": "a cat"}, "1 text files beside images, such as cat/a.txt"),
    ],
)
def test_captions_that_do_not_fit_the_images_are_refused(
    images: Path, files: dict[str, str | bytes], says: str
) -> None:
    for name, content in files.items():
        (images / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ImagesError, match=says) as caught:
        FolderSource(images)
    assert "\n" not in str(caught.value)


def test_an_undecodable_text_file_is_named(images: Path) -> None:
    (images / "cat" / "a.txt").write_bytes("größer".encode("latin-1"))
    source = FolderSource(images)
    for read in (source.text, source.__getitem__):
        with pytest.raises(CorruptImage, match=r"cat/a\.png: its caption .*cat/a\.txt cannot be read as UTF-8"):
            read(0)
    assert source.text(1) == ""


def test_the_fingerprint_follows_captions(images: Path) -> None:
    prints = [FolderSource(images).fingerprint()]
    for content in ("cat", "dog", None, ""):
        path = images / "cat" / "a.txt"
        path.unlink(missing_ok=True) if content is None else path.write_text(content)
        prints.append(FolderSource(images).fingerprint())
    (images / "cat" / "a.txt").unlink()
    for entries in (LISTED, {**LISTED, "d.png": "kleiner 😀"}):
        (images / "metadata.jsonl").write_text(lines(entries), encoding="utf-8")
        prints.append(FolderSource(images).fingerprint())
    assert prints[0] == prints[3] and len(set(prints)) == len(prints) - 1
    assert FolderSource(images).fingerprint() == prints[-1]


def test_a_folder_without_captions_is_opened_by_its_walk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is opened; beside the walk, only the two possible listings are looked up."""
    for number in range(2_000):
        (tmp_path / f"{number}.png").touch()
    asked: list[str] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: asked.append(str(path)) or real(path, **kwargs))
    monkeypatch.setattr(folder_module, "read_caption", lambda *_: pytest.fail("opened a caption"))
    source = FolderSource(tmp_path)
    assert len(asked) < 10
    assert all(source.text(index) == "" for index in range(0, len(source), 100)) and len(asked) < 10


def test_shards_give_captions_without_decoding(tmp_path: Path) -> None:
    members = {"0.png": b"no image", "0.txt": b" one\n", "1.png": encoded(1), "1.json": b'{"caption": "\\ud83dtwo"}'}
    members |= {"2.png": encoded(2), "3.png": encoded(3), "3.cls": b"0", "3.json": b"{"}
    members |= {"4.png": encoded(4), "4.json": b'{"caption": {"en": "four"}}'}
    write_tar(tmp_path / "a.tar", members)
    source = ShardSource([tmp_path / "a.tar"])
    assert [source.text(index) for index in range(3)] == ["one", "?two", ""]
    with pytest.raises(CorruptImage, match="a/3: its json"):
        source.text(3)
    for read in (source.text, source.__getitem__):
        with pytest.raises(CorruptImage, match="a/4: its json: a caption that is a JSON object; give it as text"):
            read(4)


def test_demo_captions_go_from_the_special_to_the_general(sides: list[ImageSource]) -> None:
    captions = {key: text for side in sides for key, text in zip(side.names, side.texts, strict=True)}  # type: ignore[attr-defined]
    assert captions["1f34f"] == "green apple, fruit, food & drink"
    assert captions["1f44b-1f3ff"] == "waving hand sign, wave, dark skin tone, hand fingers open, people & body"
    for side in sides:
        for index in range(0, len(side), 40):
            text = side.text(index)
            assert text == side[index].text and text == text.lower()
            assert text.endswith(side.class_names[side[index].label].lower())
            assert len(set(text.split(", "))) == len(text.split(", "))


def test_an_icon_and_its_skin_tones_are_on_one_side(sides: list[ImageSource]) -> None:
    tones = {tone.lower() for tone in SKIN_TONES}

    def bases(side: ImageSource) -> set[str]:
        names = [side.key(index) for index in range(len(side))]
        assert sum(bool(tones & set(name.split("-"))) for name in names) > 50
        return {"-".join(p for p in name.split("-") if p not in tones | {"fe0f"}) for name in names}

    assert not bases(sides[0]) & bases(sides[1])


def test_a_listing_belongs_to_its_own_side(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a.png val/b.png")
    for side, name in (("train", "a"), ("val", "b")):
        (tmp_path / side / "metadata.jsonl").write_text(lines({f"{name}.png": f"caption {name}"}))
        source = open_source(ImagesConfig(path=str(tmp_path)), side)  # type: ignore[arg-type]
        assert texts(source) == {f"{name}.png": f"caption {name}"}
