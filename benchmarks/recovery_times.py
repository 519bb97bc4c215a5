"""Where the time goes from a blow to the next step of a job: a process killed, a launcher killed, a stop by a signal, a node
without power; under either launcher, part by part, and of several checkouts in turns.

    python benchmarks/recovery_times.py --checkout before=/path/to/an/earlier/checkout --checkout after=. \\
        --out benchmarks/results/cluster-cpu.json

On a real Slurm of three nodes on this machine (tests/cluster/mini-cluster.sh, as root), with a tiny GPT of two processes on two
nodes. A requeued job waits 5 s there, and a silent node is given up after 10 s: the part `slurm` is not ours. The moments are
those at which processes began and ended, and lines and files of the run folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster_times import LONG, submit
from report import ROOT, circumstances, commit, write

from cluster_jobs import Cluster, Job, JobRun, text_source  # isort: skip (cluster_times knows where)

PARTS = {
    "others_end": "from the blow until the last training process is gone",
    "srun_returns": "until srun has returned: its wait for launchers and tasks that are left",
    "slurm_end": "until `genscale slurm end` is through",
    "slurm": "until Slurm has started the script again (where a node died: until it has noticed, too)",
    "slurm_begin": "until the script has led to the end of `genscale slurm begin`",
    "launch": "until the first training process begins",
    "import_and_meet": "until the processes have loaded their libraries, met, and have the run folder",
    "read": "until data, model and checkpoint are read",
    "first_step": "until the first step is done",
}
BLOWS = ("signal", "rank", "launcher", "node")
"""In a job's lives, one after the other. Three lives in a row without a new checkpoint would end it."""
STARTED = " parameters, "
"""In the line by which a run says what it is, when all is read."""
TICK = os.sysconf("SC_CLK_TCK")


class Witness(threading.Thread):
    """Notes when each process of a job begins and ends, on all nodes: this machine sees them all.

    Attributes:
        seen: (what, process id) -> [began, ended or None], in seconds since 1970.
    """

    def __init__(self, job: Job, run: JobRun) -> None:
        super().__init__(daemon=True)
        self.job, self.run_folder = job, str(run.folder)
        self.seen: dict[tuple[str, int], list[float | None]] = {}
        self._looking = threading.Lock()
        self._boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.03):
            self.look()

    def look(self) -> None:
        with self._looking:
            self._look()

    def _look(self) -> None:
        now, living = time.time(), set()
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                if state == "Z" or not (kind := self._kind(words.decode(errors="replace").split("\0"))):
                    continue
                key = (kind, int(pid))
                living.add(key)
                self.seen.setdefault(key, [self._boot + int(fields[18]) / TICK, None])
        for key, times in self.seen.items():
            if times[1] is None and key not in living:
                times[1] = now

    def _kind(self, words: list[str]) -> str | None:
        folder, script = str(self.job.cluster.folder), f"job{int(self.job.id):05d}/slurm_script"
        if words[-2:][0].startswith(folder) and words[-2:][0].endswith(script):  # not of another cluster on this machine
            return "script"
        if not any(self.run_folder in word for word in words):
            return None
        program = os.path.basename(words[0])
        if program == "srun":
            return "srun begin" if "begin" in words else "srun train" if "--config" in words else None
        if not program.startswith("python"):
            return None
        if {"launch", "accelerate.commands.launch"} & set(words):
            return "launcher"
        return next((word for word in ("begin", "end", "train") if word in words[:6]), None)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def script(self) -> float:
        """When the script of the present life began; its subshells look like it, and are soon gone."""
        return max(times[0] for (each, _), times in self.seen.items() if each == "script" and times[1] is None)

    def began(self, kind: str, after: float) -> float:
        return min((times[0] for (each, _), times in self.seen.items() if each == kind and times[0] > after), default=0.0)

    def ended(self, kind: str, after: float, before: float = float("inf")) -> float:
        """The last one's end, of those that had begun before."""
        return max((times[1] for (each, _), times in self.seen.items()
                    if each == kind and times[0] < before and times[1] and times[1] > after), default=0.0)


def strike(cluster: Cluster, run: JobRun, job: Job, blow: str, witness: Witness) -> None:
    if blow == "signal":
        job.signal("USR1")
    elif blow == "node":
        cluster.do("cut-power", job.details()["BatchHost"])
    elif blow == "rank":
        os.kill(_last(witness, "train"), 9)
    else:
        os.kill(_last(witness, "launcher"), 9)


def _last(witness: Witness, kind: str) -> int:
    """Of those that live, the process on the last node: the first one is where Slurm controls the job from."""
    living = [pid for (each, pid), times in witness.seen.items() if each == kind and times[1] is None]

    def rank(pid: int) -> int:
        variables = dict(word.partition("=")[::2] for word in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        return int(variables["SLURM_PROCID"])

    return max(living, key=rank)


def recover(cluster: Cluster, run: JobRun, job: Job, blow: str, witness: Witness) -> dict[str, float]:
    """Seconds of each part."""
    starts, restarts = job.output().count(STARTED), job.restarts
    struck = time.time()
    strike(cluster, run, job, blow, witness)
    job.wait_for(lambda: _steps(job.output(), starts + 1), "the next step", 200)
    stepped = time.time()
    witness.look()
    assert job.restarts == restarts + 1
    met = (run.folder / "logs" / "stacks-rank-00000.txt").stat().st_ctime  # made with the claim of the run folder
    read = next(_time_of(line) for line in reversed((run.folder / "logs" / "rank-00000.log").read_text().splitlines())
                if STARTED in line)
    script = witness.script()
    trained = witness.began("train", script)
    moments = {"others_end": witness.ended("train", struck, script),
               "srun_returns": witness.ended("srun train", struck, script), "slurm_end": witness.ended("end", struck, script),
               "slurm": script, "slurm_begin": witness.ended("srun begin", script), "launch": trained,
               "import_and_meet": met, "read": read, "first_step": stepped}
    parts, since = {}, struck
    for name, moment in moments.items():
        if blow == "node" and name in ("others_end", "srun_returns", "slurm_end"):
            continue  # gone with the node, whoever would tell
        parts[name], since = moment - since, max(since, moment)
    return {**parts, "whole": stepped - struck}


def _steps(output: str, starts: int) -> bool:
    """Whether a step is done after so many starts."""
    return output.count(STARTED) == starts and "\nstep " in output.rpartition(STARTED)[2]


def _time_of(line: str) -> float:
    return datetime.fromisoformat(line.split()[0]).timestamp()


def lives(cluster: Cluster, folder: Path, launcher: str, checkout: Path) -> dict[str, list[dict[str, float]]]:
    """A job that every blow hits in turn."""
    run = JobRun(folder, text_source(folder / "source"), **LONG)
    job = cluster.submit(run, "--nodes", "2", "--launcher", launcher, PYTHONPATH=str(checkout))
    witness = Witness(job, run)
    witness.start()
    rows: dict[str, list[dict[str, float]]] = {}
    try:
        job.wait_for(lambda: run.step() >= 1, "the first step")
        for blow in BLOWS:
            if blow == "launcher" and launcher == "srun":
                continue  # which has none on a node
            time.sleep(1)  # a life of its own, if a short one
            rows.setdefault(blow, []).append(recover(cluster, run, job, blow, witness))
            print(f"  {launcher:<10}  {blow:<8}  " + "  ".join(f"{part} {value:.1f}" for part, value in rows[blow][-1].items()),
                  file=sys.stderr, flush=True)
    finally:
        witness.stop()
        cluster.mend()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", action="append", default=[], help="NAME=FOLDER, repeatable (default: this one, as after)")
    parser.add_argument("--times", type=int, default=1, help="jobs of each launcher and checkout")
    parser.add_argument("--launcher", choices=["accelerate", "srun"], action="append")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to complete")
    arguments = parser.parse_args()
    checkouts = {name: Path(folder).resolve() for name, _, folder in
                 (each.partition("=") for each in arguments.checkout or [f"after={ROOT}"])}
    folder = Path(tempfile.mkdtemp(prefix="genscale-recovery-"))
    at = ROOT

    def submit_there(words: list[str], variables: dict[str, str]) -> str:
        return submit(words, variables, at)

    cluster = Cluster(Path(os.environ.get("SLURM_MINI_DIR", folder / "slurm")), submit_there)
    found: dict[str, dict[str, dict[str, list]]] = {}
    load = os.getloadavg()[0]
    try:
        for number in range(arguments.times):
            for launcher in arguments.launcher or ["accelerate", "srun"]:
                for name, at in checkouts.items():
                    print(f"{name}:", file=sys.stderr)
                    for blow, rows in lives(cluster, folder / f"{name}-{launcher}-{number}", launcher, at).items():
                        found.setdefault(launcher, {}).setdefault(blow, {}).setdefault(name, []).extend(rows)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    medians = {launcher: {blow: {name: median_of(rows) for name, rows in contestants.items()}
                          for blow, contestants in blows.items()} for launcher, blows in found.items()}
    print(table(medians))
    result = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    result["recovery"] = circumstances(["torch", "accelerate"]) | {
        "commits": {name: commit(at) for name, at in checkouts.items()}, "load_before": load, "parts": PARTS} | medians
    write(result, arguments.out)


def median_of(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Of every part, of the whole, and of what is not Slurm's."""
    rows = [{**row, "ours": row["whole"] - row["slurm"]} for row in rows]
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]} | {"of": len(rows)}


def table(medians: dict[str, Any]) -> str:
    """In Markdown: a row for each launcher, blow and checkout."""
    columns = [*PARTS, "whole", "ours"]
    lines = ["| launcher | blow | checkout | " + " | ".join(columns) + " |", "|---" * 3 + "|---:" * len(columns) + "|"]
    lines += [f"| {launcher} | {blow} | {name} | " + " | ".join(f"{row[part]:.1f}" if part in row else "" for part in columns)
              + " |" for launcher, blows in medians.items() for blow, names in blows.items() for name, row in names.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
