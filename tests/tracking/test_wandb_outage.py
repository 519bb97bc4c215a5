"""A W&B server that fails at the start, or in the middle: training goes on, and the printed command uploads what is missing."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("mode", ["500", pytest.param("hang", marks=[pytest.mark.slow, pytest.mark.matrix])])
def test_a_server_that_fails_at_the_start_costs_seconds_and_the_run_is_offline(mode, wandb_server, tmp_path):
    server = wandb_server
    server.mode = mode
    code = ("import sys, time\nfrom genscale.settings.config import TrackingSettings\n"
            "from genscale.tracking.trackers import Trackers\n"
            "from genscale.tracking import wandb_tracker\nimport wandb\n"
            "wandb_tracker.INIT_SECONDS = 3\nstarted = time.monotonic()\n"
            "trackers = Trackers(TrackingSettings(wandb='online'), sys.argv[1], {}, print)\n"
            "trackers.begin()\nfor step in (1, 2): trackers.log(step, {'loss': step / 3})\n"
            "print(time.monotonic() - started)\n"
            "started = time.monotonic()\ntrackers.close()\nprint(time.monotonic() - started)\n")
    (tmp_path / "run").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=server.environment(tmp_path), text=True,
                          capture_output=True, timeout=100, check=True)
    starting, warning, closing = done.stdout.splitlines()
    assert "tracking.wandb: online is not possible" in warning and "goes on offline" in warning
    assert float(starting) < 1 and float(closing) < 35  # 0 and 4 on a machine that does nothing else
    check_upload(warning, server, tmp_path, [1 / 3, 2 / 3])


def check_upload(text: str, server: Any, home: Path, losses: list[float]) -> None:
    """What is printed is typed, when the server is well again."""
    command = re.search(r"`(genscale sync [^`]*)`", text).group(1)
    server.mode = "fine"
    server.going.set()
    time.sleep(1)  # what was held back is answered to nobody
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, env=server.environment(home), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert server.losses == losses, done.stdout


@pytest.mark.slow
@pytest.mark.matrix  # in CI: fault 8 of tests/faults/test_cases.py
@pytest.mark.parametrize("mode", ["500", "hang"])
def test_a_server_that_fails_in_the_middle_costs_no_step_and_no_metric(mode, wandb_server, tmp_path, tiny_config, tiny_run,
                                                                       genscale_start, genscale_finish):  # fmt: skip
    server = wandb_server
    arguments = ["--train.steps", 400, "--train.log_every", 20, "--train.checkpoint_every", 0, "--tracking.wandb", "online"]
    variables = {name: value for name, value in server.environment(tmp_path).items() if name.startswith(("WANDB_", "HOME"))}
    process = genscale_start("train", "--config", tiny_config, *arguments, **variables)
    metrics, deadline = tiny_run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert server.begun.wait(60)
    server.mode = mode
    done = genscale_finish(process, 150)
    assert done.code == 0, done.err
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 20
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: tracking.wandb")]
    assert len(warnings) == 1 and "Traceback" not in done.err, done.err
    for path in tiny_run.rglob("*"):
        assert not path.is_file() or server.key.encode() not in path.read_bytes(), path
    check_upload(warnings[0], server, tmp_path, losses)
