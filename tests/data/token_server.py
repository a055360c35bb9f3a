"""A web server in its own process that serves a folder's files, and fails for files named in ``faults.json``."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

FAULTS = "faults.json"


class Handler(SimpleHTTPRequestHandler):
    """Serves files; ``faults.json`` maps a path to its fault and how often it occurs: {path: [fault, times]}."""

    def do_GET(self) -> None:
        folder = Path(self.directory)
        with (folder / "asked.txt").open("a") as log:
            log.write(self.path + "\n")
        faults = json.loads((folder / FAULTS).read_text()) if (folder / FAULTS).exists() else {}
        asked = (folder / "asked.txt").read_text().splitlines().count(self.path)
        fault, times = faults.get(self.path, ("", 0))
        if asked > times:
            super().do_GET()
            return
        content = bytearray((folder / self.path[1:]).read_bytes())
        if fault == "missing":
            self.send_error(404)
            return
        if fault == "corrupt":
            content[len(content) // 2] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        if fault == "stalled":
            threading.Event().wait()
        if fault == "corrupt":
            self.wfile.write(content[half:])

    def log_message(self, *args: object) -> None:
        """Do not log."""


def _serve(folder: Path, port: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve ``folder``; yields its URL."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=_serve, args=(folder, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def asked(folder: Path) -> list[str]:
    """Paths requested from the server so far."""
    return (folder / "asked.txt").read_text().splitlines()


def fail(folder: Path, **faults: tuple[str, int]) -> None:
    """Make shards of the train split fail: ``_name=(fault, times)``."""
    named = {f"/train/{name[1:]}.tar": fault for name, fault in faults.items()}
    (folder / FAULTS).write_text(json.dumps(named))
