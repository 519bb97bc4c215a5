"""A web server of files, as static hosts are: with range requests, and a log of what it was asked."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; answers `Range` unless `ranges` is off."""

    protocol_version = "HTTP/1.1"
    ranges = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the reader has gone
            super().handle()

    def _answer(self, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if not path.is_file():
            return self.send_error(404)
        content, status, extra = path.read_bytes(), 200, {"Accept-Ranges": "bytes"} if self.ranges else {}
        if wanted and self.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), int(last) + 1 if last else len(content)
            if start >= len(content):
                return self.send_error(416)
            extra["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.server.asked.append((self.path, wanted, len(content) if body else 0))
        self.send_response(status)
        for name, value in {**extra, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            try:
                self.wfile.write(content)
            except OSError:  # the reader has gone: it wanted no more than the beginning
                self.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list]]]:
    """serve(folder, ranges=True) -> (its URL, the list of (path, range, bytes) it was asked)."""
    servers = []

    def start(folder: Path, ranges: bool = True, handler: type = Handler) -> tuple[str, list]:
        chosen = type("Chosen", (handler,), {"ranges": ranges})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(chosen, directory=str(folder)))
        server.daemon_threads, server.asked = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
