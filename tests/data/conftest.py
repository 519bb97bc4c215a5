"""A web server of files, as static hosts are: with range requests, and a log of what it was asked; and a small dataset hub."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMMIT = "c" * 40


class Server(http.server.ThreadingHTTPServer):
    """Remembers its connections: those that are kept open outlive its end otherwise."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


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
        server = Server(("127.0.0.1", 0), functools.partial(chosen, directory=str(folder)))
        server.asked = []
        server.faults, server.met, server.gone_until, server.etag, server.woken = [], [], 0.0, "", threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server.asked

    start.servers = servers
    yield start
    for server in servers:
        server.woken.set()
        server.shutdown()
        server.server_close()


class Broken(Handler):
    """Fails on purpose: each request for bytes of a file takes the next of the server's `faults`, until there are none."""

    def _answer(self, body: bool) -> None:
        if time.monotonic() < self.server.gone_until:
            return self._reset()
        fault = self.server.faults.pop(0) if self.server.faults and self.headers.get("Range") != "bytes=0-0" else "none"
        if fault != "none":
            self.server.met.append(fault)
        kind, _, wait = fault.partition(" ")
        if kind.isdigit():
            self.send_response(int(kind))
            if wait:
                date = formatdate(time.time() + float(wait.lstrip("@")), usegmt=True)
                self.send_header("Retry-After", date if wait.startswith("@") else wait)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if kind == "reset":
            return self._reset()
        if kind == "silent":
            self.server.woken.wait(30)
            return self._reset()
        if kind == "truncated":
            self.wfile = Cut(self.wfile, 1000)
        super()._answer(body)

    def _reset(self) -> None:
        # Closed with bytes pending and no time to linger: the other side sees a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def end_headers(self) -> None:
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        super().end_headers()


class Cut:
    """A connection that breaks off after so many bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left

    def write(self, content: bytes) -> None:
        self._file.write(content[: self._left])
        self._left -= len(content)
        if self._left <= 0:
            raise ConnectionAbortedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def outage() -> Callable[[Server], Callable[[], Server]]:
    """outage(server): connections are refused from now on; what it returns starts the server again at the same address."""
    def end(server: Server) -> Callable[[], Server]:
        server.shutdown()
        server.server_close()
        for connection in server.connections:
            with contextlib.suppress(OSError):  # closed by now
                connection.shutdown(socket.SHUT_RDWR)

        def again() -> Server:
            other = Server(server.server_address, server.RequestHandlerClass)
            other.__dict__ |= {name: value for name, value in server.__dict__.items() if name not in other.__dict__}
            threading.Thread(target=other.serve_forever, daemon=True).start()
            return other
        return again
    return end


@pytest.fixture
def broken_server(serve) -> Callable[..., tuple[str, Server]]:
    """broken_server(folder, ranges=True) -> (its URL, the server). To be set on it at any time: `faults`, what the next
    requests meet, each one of "503", "429 SECONDS" or "503 @SECONDS" (Retry-After as a number or as a date), "reset", "silent",
    "truncated" and "none"; `gone_until`, a time.monotonic() up to which every connection is reset; `etag`. `met` are the faults
    that requests have met."""
    def start(folder: Path, ranges: bool = True) -> tuple[str, Server]:
        url, _ = serve(folder, ranges, Broken)
        return url, serve.servers[-1]
    return start


class Hub(http.server.BaseHTTPRequestHandler):
    """A dataset hub of one dataset, `dataset`, whose files are `files`."""

    dataset: str
    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), Content_Type="application/json", X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        info = f"/api/datasets/{self.dataset}"
        if path in (info, f"{info}/revision/{COMMIT}"):
            return self._json({"id": self.dataset, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        if path == f"{info}/tree/{COMMIT}":
            return self._json([{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                               for name, content in self.files.items()])
        found = re.fullmatch(f"/datasets/{self.dataset}/resolve/{COMMIT}/(.+)", path)
        if not found or found[1] not in self.files:
            return self._reply(404, X_Error_Code="EntryNotFound" if self.dataset in path else "RepoNotFound")
        content, wanted = self.files[found[1]], self.headers.get("Range")
        start, stop = (int(part) for part in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content) - 1)
        stop = min(stop, len(content) - 1)
        self._reply(206 if wanted else 200, content[start : stop + 1], ETag='"1"', X_Repo_Commit=COMMIT,
                    Content_Range=f"bytes {start}-{stop}/{len(content)}")


@pytest.fixture(scope="module")
def serve_hub() -> Iterator[Callable[[str, dict[str, bytes]], str]]:
    """serve_hub("someone/dataset", {file name: content}) -> the address of a hub that has it."""
    servers = []

    def start(dataset: str, files: dict[str, bytes]) -> str:
        server = Server(("127.0.0.1", 0), type("Chosen", (Hub,), {"dataset": dataset, "files": files}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    start.servers = servers
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
