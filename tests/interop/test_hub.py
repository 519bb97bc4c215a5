"""`model.from` by a name on the hub: fetched from a hub on this machine, taken from the cache, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from genscale.errors import UserError
from genscale.interop.huggingface import find_folder, open_huggingface
for name in sys.argv[1:]:
    try:
        files = sorted(path.name for path in find_folder(name).iterdir())
        print(files, open_huggingface(name)[1]("final_norm.weight").sum().item())
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a download of one small model takes: demo/llama is there, demo/gated wants consent."""

    folder: Path

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/demo/llama/tree/"):
            files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                     for file in self.folder.iterdir()]
            self._send(200, json.dumps(files).encode(), body)
        elif path.startswith("/api/models/demo/llama/"):
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            self._send(200, json.dumps({"id": "demo/llama", "sha": SHA, "siblings": files}).encode(), body)
        elif path.startswith(f"/demo/llama/resolve/{SHA}/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            self._send(200, content, body, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": SHA})
        elif "/demo/gated" in path:
            self._send(403, b"{}", body, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's stderr."""


@pytest.fixture
def hub(model_named, saved) -> Iterator[str]:
    """The address of a hub that holds a tiny Llama, a pickle beside it."""
    folder = saved(model_named("llama"))
    (folder / "pytorch_model.bin").write_bytes(b"not to be fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneModel", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub(hub: str, tmp_path: Path, python_process: Callable[..., str]) -> None:
    def ask(address: str, cache: Path, *names: str, **variables: str) -> list[str]:
        """One line for each name: what was found, or the message."""
        said = python_process(ASK, *names, HF_ENDPOINT=address, HF_HOME=str(cache), **variables)
        return [line for line in said.splitlines() if line]

    found, gated, absent = ask(hub, tmp_path / "cache", "demo/llama", "demo/gated", "demo/nothing")
    assert found.startswith("['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json'] ")
    assert "demo/gated asks for consent" in gated and "hf auth login" in gated
    assert "no folder demo/nothing here, and the hub has no such model" in absent

    # What was fetched stays, also where there is no hub; what was not is one line that says what to do.
    nowhere = "http://127.0.0.1:9"
    cached, unreachable = ask(nowhere, tmp_path / "cache", "demo/llama", "demo/other")
    assert cached == found
    assert "model.from: there is no folder demo/other here" in unreachable
    assert "hf download demo/other --local-dir DIR" in unreachable
    assert "cannot be reached" in ask(nowhere, tmp_path / "empty", "demo/llama", HF_HUB_OFFLINE="1")[0]
