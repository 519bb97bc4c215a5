"""A W&B server on loopback, as far as one that has to keep runs is needed."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

KEY = "c0ffee" + "1234567890" * 3 + "cafe"


class Server:
    """Keeps the lines of each run's files, as W&B's own does: a client says at which line its own begin, and asks how many
    there are when it resumes a run.

    Attributes:
        mode: `fine`, `500` (every answer), `hang` (no answer) or `403` (runs are not taken).
        runs: the lines of each run by file, as `runs["abc"]["wandb-history.jsonl"]`.
        files: names of all that was uploaded beside.
        key: that lets one in.
        begun: a run has been taken; clients start behind what they train.
    """

    def __init__(self) -> None:
        self.mode, self.going, self.begun, self.key = "fine", threading.Event(), threading.Event(), KEY
        self.runs: dict[str, dict[str, list[str]]] = {}
        self.files: set[str] = set()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if server.mode == "hang":
                    server.going.wait(120)
                code = 403 if server.mode == "403" and b"UpsertBucket" in body else 500 if server.mode == "500" else 200
                answer = server.answer(self.path, body) if code == 200 else {"errors": [{"message": "permission denied"}]}
                with contextlib.suppress(BrokenPipeError):  # the asker has gone
                    self.reply(code, json.dumps(answer).encode() if code != 500 else b"")

            def reply(self, code: int, content: bytes) -> None:
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def history(self, run: str | None = None) -> list[dict[str, Any]]:
        """The rows of a run, or of the only one there is, in the order of its file."""
        if run is None:
            assert len(self.runs) <= 1, self.runs.keys()
            run = next(iter(self.runs), "")
        return [json.loads(line) for line in self.runs.get(run, {}).get("wandb-history.jsonl", [])]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.history() if "loss" in row]

    def answer(self, path: str, body: bytes) -> dict:
        if "file_stream" in path:
            kept = self.runs.setdefault(path.split("/")[-2], {})
            for name, part in json.loads(body).get("files", {}).items():
                kept.setdefault(name, [])[part.get("offset", 0):] = part["content"]
            return {}
        asked = json.loads(body) if body.startswith(b"{") else {}
        query, variables = asked.get("query", ""), asked.get("variables", {})
        project = {"id": "p", "name": "genscale", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            return {"data": {"model": {**project, "bucket": self._bucket(variables["name"])}}}
        if "UpsertBucket" in query:
            self.begun.set()
            name = variables["name"]
            bucket = {"id": "b", "name": name, "displayName": name, "description": "", "config": "{}", "sweepName": None,
                      "historyLineCount": len(self.history(name)), "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": name not in self.runs}}}
        if "CreateRunFiles" in query:
            self.files |= {*variables["files"]}
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        history, events = (self.runs[name].get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events"))
        return {"id": "b", "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}", "tags": [], "notes": "",
                "wandbConfig": "{}", "logLineCount": 0, "historyLineCount": len(history), "eventsLineCount": len(events),
                "historyTail": json.dumps(history[-1:]), "eventsTail": json.dumps(events[-1:])}

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that has an account there, and none elsewhere."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        return kept | {"HOME": str(home), "WANDB_BASE_URL": self.address, "WANDB_API_KEY": self.key,
                       "WANDB_ERROR_REPORTING": "false"}

    def close(self) -> None:
        self.going.set()
        self._http.shutdown()
