"""`genscale doctor` in a job of two nodes: from its batch script, and as a task of srun on each."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("srun", "--ntasks=2", "--ntasks-per-node=1")


@pytest.fixture
def said(cluster, jobs, tmp_path):
    """`said(before, folder, *flags)`: the checks by name of a doctor that looks at `folder`, started by the words `before`."""

    def ask(before: tuple[str, ...], folder: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
        command = [*before, sys.executable, "-m", "genscale", "doctor", "--json", "--folder", str(folder), *flags]
        job, out, over = (tmp_path / name for name in ("job.sbatch", "out", "over"))
        job.write_text(f"#!/bin/bash\ncd {ROOT}\nexport OMP_NUM_THREADS=1\n{shlex.join(command)} 2>{out}.err\ntouch {over}\n")
        shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=5")
        cluster.slurm("sbatch", *shape, f"--output={out}", str(job))
        deadline = time.monotonic() + jobs.PATIENCE
        while not over.exists():
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.2)
        over.unlink()
        checks: dict[str, list[dict[str, Any]]] = {}
        for check in json.loads(out.read_text())["checks"]:
            checks.setdefault(check["name"], []).append(check)
        return checks

    return ask


def test_a_batch_script_asks_every_node(said, tmp_path):
    checks = said((), tmp_path, "--quick")
    assert {check["host"] for check in checks["disk speed"]} == {"node0", "node1"}
    assert [checks[name][0]["state"] for name in ("nodes", "clocks", "shared folder")] == ["ok", "ok", "ok"], checks
    # /dev/shm is each node's own.
    (local,) = said((), Path("/dev/shm"), "--quick")["shared folder"]
    assert local["state"] == "warning" and "not seen by node1" in local["found"] and "run.dir" in local["remedy"]


def test_tasks_of_srun_are_a_group(said, tmp_path):
    checks = said(TASKS, tmp_path)
    assert checks["rendezvous"][0]["found"] == "2 processes on 2 nodes: node0, node1"
    (reduced,) = checks["all-reduce"]
    assert reduced["state"] != "failure" and reduced["found"].startswith("gloo, 2 processes, 16 MiB")
    assert [checks[name][0]["state"] for name in ("clocks", "shared folder")] == ["ok", "ok"], checks
