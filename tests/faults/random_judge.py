"""A server that judges at random: the same answer has another reward each time it is asked for."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass
class Judge:
    """What it has been asked, and how a run asks it.

    Attributes:
        settings: flags of `genscale train`.
        asked: answers that it has judged.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def judging_at_random(folder: Path) -> Iterator[Judge]:
    """While it serves. The site, for this process and those that it starts, allows it."""
    judge = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answers = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["answers"]
            with judge.lock:
                judge.asked += len(answers)
            reply = json.dumps({"rewards": [random.SystemRandom().random() for _ in answers]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: object) -> None: ...

    site = folder / "site.yaml"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, patch.dict(os.environ, {"GENSCALE_SITE": str(site)}):
        url = f"http://127.0.0.1:{server.server_port}/"
        site.write_text(json.dumps({"rewards": {"addresses": [url]}}))
        judge.settings = {"objective.rewards": json.dumps([{"name": "http", "url": url}])}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield judge
        finally:
            server.shutdown()
