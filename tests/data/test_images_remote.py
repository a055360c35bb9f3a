"""Shards at URLs: downloaded once, completely or not at all, with the same images as from disk."""

import errno
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.images.config import ImagesConfig
from data.images.remote import local_copy
from data.images.source import ImagesError
from data.images.sources import open_source
from data.remote import is_remote
from tests.data.test_images_sources import encoded, keys, write_tar


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVES_DATA", str(tmp_path / "home"))
    return tmp_path / "home/shards"


@pytest.fixture
def stored(tmp_path):
    """Two shards, each with three labeled images."""
    for number in range(2):
        members = {}
        for row in range(3):
            members |= {f"{row}.png": encoded(10 * number + row), f"{row}.cls": b"%d" % row}
        write_tar(tmp_path / f"store/shard-{number}.tar", members)
    return tmp_path / "store"


def test_urls_are_told_from_paths():
    for name in ("pipe:cat a.tar", "https://a.b/{0..3}.tar", "s3://bucket/a.tar", "file:///a.tar"):
        assert is_remote(name)
    for name in ("a.tar", "/data/a{0..3}.tar", "C:/a.tar", "folder"):
        assert not is_remote(name)


def test_a_pipe_gives_the_images_of_the_disk_and_runs_once(stored, home, tmp_path):
    urls = f"pipe:echo x >> {tmp_path}/calls; cat {stored}/shard-{{0..1}}.tar"
    config = ImagesConfig(kind="webdataset", path=urls, size=4)
    remote, local = (
        open_source(config, "train"),
        open_source(ImagesConfig(kind="webdataset", path=str(stored)), "train"),
    )
    assert len(remote) + len(open_source(config, "val")) == 6
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    shades = sorted(remote[index].image.getpixel((0, 0))[0] for index in range(len(remote)))
    assert len(keys(remote)) == len(remote) and set(shades) <= {0, 1, 2, 10, 11, 12}
    assert list(remote.class_names) == list(local.class_names) == ["0", "1", "2"]
    assert sorted(path.suffix for path in home.iterdir()) == [".lock", ".lock", ".tar", ".tar"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset needs curl")
def test_a_web_server_is_asked_once_by_two_at_a_time(stored, home):
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(stored)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shard-0.tar"
    found = []
    both = [threading.Thread(target=lambda: found.append(local_copy(url))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    server.shutdown()
    assert asked == ["/shard-0.tar"] and found[0] == found[1]
    assert found[0].read_bytes() == (stored / "shard-0.tar").read_bytes()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:cat {store}/none.tar", "exit"),
        ("pipe:true", "is no complete, uncompressed tar"),
        ("pipe:echo please log in", "is no complete, uncompressed tar"),
        ("pipe:head -c 700 {file}", "is no complete, uncompressed tar"),
        ("pipe:head -c 700 {file}; false", "exit"),
        ("abc://bucket/a.tar", "cannot read abc:; allowed: file, s3, pipe, http"),
    ],
)
def test_what_does_not_come_is_one_line_and_leaves_nothing(stored, home, url, said):
    url = url.format(store=stored, file=stored / "shard-0.tar")
    with pytest.raises(ImagesError, match=said) as error:
        open_source(ImagesConfig(kind="webdataset", path=url, size=4), "train")
    assert str(error.value).startswith(url) and "\n" not in str(error.value)
    assert not list(home.glob("*.tar*"))


def test_a_full_disk_is_not_the_fault_of_the_store(stored, home, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.images.remote.publish", full)
    with pytest.raises(OSError, match="No space left"):
        local_copy(f"pipe:cat {stored}/shard-0.tar")
    assert not list(home.glob("*.tar*"))


def test_parts_of_a_killed_fetch_are_removed_and_held_out_shards_may_be_elsewhere(stored, home):
    url = f"pipe:cat {stored}/shard-1.tar"
    copy = local_copy(url)
    stale = copy.with_name(f"{copy.name}.tmp-1")
    stale.write_bytes(b"half")
    copy.unlink()
    config = ImagesConfig(kind="webdataset", path=str(stored / "shard-0.tar"), val_path=url, size=4)
    assert len(open_source(config, "train")) == len(open_source(config, "val")) == 3
    assert not stale.exists()
