"""A W&B server that fails at the start, or in the middle: training goes on, and the printed command uploads what is missing."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KEY = "c0ffee" + "1234567890" * 3 + "cafe"


class Server:
    """As much of a W&B server as one run needs, on loopback.

    Attributes:
        mode: `fine`, `500` (every answer) or `hang` (no answer).
        rows: the loss of every history row it was sent, in order.
    """

    def __init__(self) -> None:
        self.mode, self.rows, self.going = "fine", [], threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if server.mode == "hang":
                    server.going.wait(120)
                content = json.dumps(server.answer(self.path, body)).encode() if server.mode == "fine" else b""
                with contextlib.suppress(BrokenPipeError):  # the asker has gone
                    self.reply(content)

            def reply(self, content: bytes) -> None:
                self.send_response(200 if server.mode == "fine" else 500)
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

    def answer(self, path: str, body: bytes) -> dict:
        if "file_stream" in path:
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                if "loss" in (row := json.loads(line)):
                    self.rows.append(row["loss"])
            return {}
        query = json.loads(body).get("query", "") if body.startswith(b"{") else ""
        project = {"id": "p", "name": "genscale", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            return {"data": {"model": {**project, "bucket": None}}}
        if "UpsertBucket" in query:
            name = json.loads(body)["variables"]["name"]
            bucket = {"id": "b", "name": name, "displayName": name, "description": "", "config": "{}", "sweepName": None,
                      "historyLineCount": 0, "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in json.loads(body)["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def close(self) -> None:
        self.going.set()
        self._http.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def environment(server: Server, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"HOME": str(home), "WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}


@pytest.mark.parametrize("mode", ["500", pytest.param("hang", marks=[pytest.mark.slow, pytest.mark.matrix])])
def test_a_server_that_fails_at_the_start_costs_seconds_and_the_run_is_offline(mode, server, tmp_path):
    server.mode = mode
    code = ("import sys, time\nfrom genscale.config import TrackingSettings\nfrom genscale.tracking.trackers import Trackers\n"
            "from genscale.tracking import wandb_tracker\nimport wandb\n"
            "wandb_tracker.INIT_SECONDS = 3\nstarted = time.monotonic()\n"
            "trackers = Trackers(TrackingSettings(wandb='online'), sys.argv[1], {}, print)\n"
            "print(time.monotonic() - started)\nfor step in (1, 2): trackers.log(step, {'loss': step / 3})\n"
            "started = time.monotonic()\ntrackers.close()\nprint(time.monotonic() - started)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment(server, tmp_path), text=True,
                          capture_output=True, timeout=100, check=True)
    warning, starting, closing = done.stdout.splitlines()
    assert "tracking.wandb: online is not possible" in warning and "goes on offline" in warning
    assert float(starting) < 25 and float(closing) < 10  # 4 and 0.1 on a machine that does nothing else
    check_upload(warning, server, tmp_path, [1 / 3, 2 / 3])


def check_upload(text: str, server: Server, home: Path, losses: list[float]) -> None:
    """What is printed is typed, when the server is well again."""
    command = re.search(r"`(wandb sync [^`]*)`", text).group(1)
    server.mode = "fine"
    server.going.set()
    time.sleep(1)  # what was held back is answered to nobody
    server.rows.clear()
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, env=environment(server, home), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert server.rows == losses, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["500", pytest.param("hang", marks=pytest.mark.matrix)])
def test_a_server_that_fails_in_the_middle_costs_no_step_and_no_metric(mode, server, tmp_path, tiny_config, tiny_run,
                                                                       genscale_start, genscale_finish):  # fmt: skip
    arguments = ["--train.steps", 400, "--train.log_every", 20, "--train.checkpoint_every", 0, "--tracking.wandb", "online"]
    variables = {name: value for name, value in environment(server, tmp_path).items() if name.startswith(("WANDB_", "HOME"))}
    process = genscale_start("train", "--config", tiny_config, *arguments, **variables)
    metrics, deadline = tiny_run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    server.mode = mode
    done = genscale_finish(process, 150)
    assert done.code == 0, done.err
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 20
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: tracking.wandb")]
    assert len(warnings) == 1 and "Traceback" not in done.err, done.err
    for path in tiny_run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    check_upload(warnings[0], server, tmp_path, losses)
