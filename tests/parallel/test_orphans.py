"""Processes whose launcher is killed outright while they start: they must not wait for each other at its address for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Rank 0 follows the launcher already when that is killed; rank 1 comes to it only afterwards. Neither answers SIGTERM,
# as a process does not that is deep in a library.
WORKER = """
import os, signal, sys, time
from genscale.parallel.launcher import follow_launcher
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank, launcher = os.environ["RANK"], os.getppid()
if rank == "0":
    follow_launcher(starting=True)
with open(os.path.join(sys.argv[1], rank), "w") as file:
    file.write(str(os.getpid()))
while rank == "1" and os.getppid() == launcher:
    time.sleep(0.05)
follow_launcher(starting=True)
time.sleep(120)
"""
STARTER = "import sys; from genscale.parallel.launcher import run_workers; sys.exit(run_workers(2, sys.argv[1:]))"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent was killed")
def test_processes_whose_launcher_was_killed_while_they_started_end(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    launcher = subprocess.Popen([sys.executable, "-c", STARTER, str(script), str(tmp_path)], env=environment, cwd=ROOT)
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 90
    while not all(file.exists() and file.read_text() for file in files):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = [psutil.Process(int(file.read_text())) for file in files]
    launcher.kill()
    launcher.wait(30)
    _, left = psutil.wait_procs(workers, timeout=30)
    for worker in left:
        worker.kill()
    assert not left
