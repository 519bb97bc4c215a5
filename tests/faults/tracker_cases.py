"""Fault 8: a W&B server that nobody reaches, or that fails in the middle of a run."""

from __future__ import annotations

import random
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from fault_bench import STEPS, Bench, Case, end, living, wait_for_step
from fault_campaign import check_same
from fault_runs import ROOT, training_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))

from loopback_wandb import Server


def tracker_unreachable(bench: Bench, draw: random.Random) -> float:
    """Fault 8: W&B online, and nobody answers; the seconds are those of the start, to the first step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = bench.run(**{"tracking.wandb": "online"})
    with living(run, bench.shape, WANDB_BASE_URL=nobody, WANDB_API_KEY="0" * 40) as life:
        wait_for_step(run, life, 1)
        seconds = time.monotonic() - life.started
        output = end(life, 0)
    assert "Traceback" not in output, output[-5000:]
    assert re.search(r"`genscale sync ", output), output[-5000:]
    check_same(run, bench.truth)
    return seconds


def tracker_fails(bench: Bench, draw: random.Random) -> float:
    """Fault 8: W&B's server answers with errors, or no more, in the middle of the run, which does not notice; the command that
    it prints uploads all that is in metrics.jsonl once the server is well. The seconds are those of the upload."""
    server, run = Server(), bench.run(**{"tracking.wandb": "online"})
    environment = server.environment(run.scratch)
    variables = {name: value for name, value in environment.items() if name.startswith(("WANDB_", "HOME"))}
    try:
        with living(run, bench.shape, **variables) as life:
            wait_for_step(run, life, draw.randint(1, STEPS // 2))
            assert server.begun.wait(60)
            server.mode = draw.choice(["500", "hang"])
            output = end(life, 0)
        warnings = [line for line in output.splitlines() if line.startswith("warning: tracking.wandb")]
        assert len(warnings) == 1 and "not possible" not in warnings[0] and "Traceback" not in output, output[-5000:]
        server.mode = "fine"
        server.going.set()
        began = time.monotonic()
        command = shlex.split(re.search(r"`(genscale sync [^`]*)`", warnings[0]).group(1))
        uploaded = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True,
                                  timeout=200)
        seconds = time.monotonic() - began
        assert uploaded.returncode == 0, uploaded.stderr
        rows = {row["_step"]: row for row in server.history()}
        for line in training_lines(run.metrics()):
            names = line.keys() - {"step", "data_digest"}
            assert {name: rows[line["step"]][name] for name in names} == {name: line[name] for name in names}
    finally:
        server.close()
    check_same(run, bench.truth)
    return seconds


CASES: dict[str, Case] = {"8 W&B unreachable": tracker_unreachable, "8 W&B fails in the middle": tracker_fails}
