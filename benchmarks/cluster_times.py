"""What the lives of a job cost: seconds from `genscale slurm submit` to the first step, from a signal to the checkpoint, from
the death of a node to the next step; and twenty lives in a row, each ended by its time limit of a minute.

    python benchmarks/cluster_times.py --out benchmarks/results/cluster-cpu.json

On a real Slurm of three nodes on this machine (tests/cluster/mini-cluster.sh, as root), with a tiny GPT of two processes on two
nodes: what is measured is all that is not training. A requeued job waits 5 s there, and a silent node is given up after 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import ROOT, circumstances, write

sys.path.insert(0, str(ROOT / "tests" / "cluster"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from cluster_jobs import Cluster, JobRun, text_source
from fault_campaign import check_same
from fault_runs import Shape

LIVES = 20
STEPS_A_LIFE = 10
LONG = {"train.steps": 100_000, "train.checkpoint_every": 100_000}
"""A run that goes on for as long as it takes, and has no checkpoints but those that something asks for."""
FOR_EVER = 1200.0


def submit(words: list[str], variables: dict[str, str], checkout: Path = ROOT) -> str:
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    command = [sys.executable, "-m", "genscale", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def disturbed(cluster: Cluster, folder: Path, launcher: str) -> dict[str, float]:
    """One job: submitted, stopped by a signal, requeued; then the node of its rank 0 loses its power."""
    run = JobRun(folder, text_source(folder / "source"), **LONG)
    began = time.monotonic()
    job = cluster.submit(run, "--nodes", "2", "--launcher", launcher)
    found = {"submit_returns": time.monotonic() - began}
    job.wait_for(lambda: run.step() >= 1, "the first step")
    found["submit_to_first_step"] = time.monotonic() - began

    struck = time.monotonic()
    job.signal("USR1")
    job.wait_for(lambda: run.saved() > 0, "a checkpoint")
    found["signal_to_checkpoint"] = time.monotonic() - struck
    saved = run.saved()
    job.wait_for(lambda: run.step() > saved, "the next step")
    found["signal_to_next_step"] = time.monotonic() - struck

    before, struck = run.metrics_file.stat().st_ino, time.monotonic()
    cluster.do("cut-power", job.details()["BatchHost"])
    # The file is written anew as the run is taken up again.
    job.wait_for(lambda: run.metrics_file.stat().st_ino != before and run.step() > saved, "the next step")
    found["node_death_to_next_step"] = time.monotonic() - struck
    cluster.mend()
    return found


def stopwatch(cluster: Cluster, folder: Path, times: int) -> dict[str, Any]:
    """Under either launcher: seconds of every stretch, over so many jobs."""
    found = {}
    for launcher in ("accelerate", "srun"):
        rows = [disturbed(cluster, folder / f"{launcher}-{number}", launcher) for number in range(times)]
        found[launcher] = {name: summary([row[name] for row in rows]) for name in rows[0]}
    return found


def lives_in_a_row(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Every life trains ten steps, and then waits for the signal of its time limit."""
    source = text_source(folder / "source")
    settings = {"train.steps": STEPS_A_LIFE * LIVES, "train.checkpoint_every": 7}
    truth, run = JobRun(folder / "undisturbed", source, **settings), JobRun(folder / "lives", source, **settings)
    truth.run_to_end(Shape("ddp", 2))
    planted = ",".join(f"await-signal@{STEPS_A_LIFE * life}" for life in range(1, LIVES))
    began = time.monotonic()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "srun", "--time", "1", "--lead", "5", planted=planted)
    details = job.end(seconds=2 * 90 * LIVES)
    seconds = time.monotonic() - began
    check_same(run, truth)
    lives = run.document("jobs/lives.json")["lives"]
    return {"lives": int(details["Restarts"]) + 1, "steps": settings["train.steps"], "seconds": round(seconds),
            "steps_of_each": [life["end_step"] - life["step"] for life in lives],
            "digest": run.latest().digest(), "digest_of_the_uninterrupted_run": truth.latest().digest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["stopwatch", "lives"], help="one of the two")
    parser.add_argument("--times", type=int, default=3, help="jobs of the stopwatch under each launcher")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to complete")
    arguments = parser.parse_args()
    result = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="genscale-times-"))
    cluster = Cluster(folder / "slurm", submit)
    here = circumstances(["torch", "accelerate"]) | {"slurm": cluster.slurm("sinfo", "--version").strip()}
    try:
        if arguments.only != "lives":
            result["stopwatch"] = here | {"load_before": os.getloadavg()[0]} | stopwatch(cluster, folder, arguments.times)
            write(result, arguments.out)
        if arguments.only != "stopwatch":
            result["lives_in_a_row"] = here | {"load_before": os.getloadavg()[0]} | lives_in_a_row(cluster, folder / "row")
            write(result, arguments.out)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 2), "worst": round(max(values), 2), "of": len(values)}


if __name__ == "__main__":
    main()
