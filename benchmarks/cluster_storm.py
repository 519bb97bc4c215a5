"""An hour of storm on a cluster: runs under either launcher, DDP and FSDP2, each through a dozen blows in the order that a seed
draws (storm_blows.py), and each held against the run that nobody disturbed: the digest of its weights, its metrics, its order.

    python benchmarks/cluster_storm.py --seed 1 --minutes 60 --out benchmarks/results/cluster-storm-cpu.json

On a real Slurm of three nodes on this machine (tests/cluster/mini-cluster.sh, as root). Every kind of blow is done before any
is done again. What a job that has ended or is held needs of its user, `genscale slurm resubmit` or `release`, is done and
counted. Exit code 1 where anything differs, a kind of blow was not done, or a life or a job has ended without a reason; then
the storm's folder is kept. Ctrl-C ends it, and writes what there is. A storm of less than twenty minutes is too short for all
kinds: see --only.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from cluster_times import submit  # it adds the paths of the cluster's tests
from report import ROOT, circumstances, write

from cluster_jobs import NODES, Cluster, Job, JobRun, text_source  # isort: skip
from fault_campaign import check_same  # isort: skip
from fault_runs import Shape  # isort: skip
from storm_blows import BLOWS, MINUTES, Scene, job_in  # isort: skip

SHAPES = (("accelerate", "ddp"), ("srun", "fsdp2"), ("srun", "ddp"), ("accelerate", "fsdp2"))
STEPS, PACE = 300, 0.25
"""Of a run, and the seconds that every step takes longer under the storm: a blow is to find it on its way."""
SETTINGS = {"train.steps": STEPS, "train.checkpoint_every": 10}
CALM = 150
"""No blow from this step on: a time limit takes half a minute to come."""
EARLY = {"preemption", "controller away", "leaking environment"}
"""What may also come while a life starts. (A SIGUSR1 is lost on who does not listen yet, but for that of a time limit.)"""
PATIENCE = 480.0
"""Seconds from a blow to the next step, at most: this machine may be busy."""


class Storm:
    """Runs one after another, and what befalls them.

    Args:
        disk: for the run folders.
        folder: for everything else.
        checkout: that jobs are submitted from.
        kinds: of blows.
    """

    def __init__(self, cluster: Cluster, disk: Path, folder: Path, checkout: Path, seed: int, minutes: float,
                 kinds: list[str]) -> None:
        self.cluster, self.disk, self.folder, self.kinds = cluster, disk, folder, kinds
        self.checkout, self.submit = checkout, partial(submit, checkout=checkout)
        self.draw, self.began, self.ends = random.Random(seed), time.monotonic(), time.monotonic() + 60 * minutes
        self.source = text_source(folder / "source")
        self.truths: dict[str, JobRun] = {}
        self.runs: list[dict[str, Any]] = []
        self.blows: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self._bag: list[str] = []

    def rage(self) -> None:
        """Runs until the minutes are over; the last one is left in peace then."""
        while time.monotonic() < self.ends:
            launcher, strategy = SHAPES[len(self.runs) % len(SHAPES)]
            truth = self._truth(strategy)
            self.runs.append({"launcher": launcher, "strategy": strategy, "equal": False})
            run = self._new_run(self.disk / f"{len(self.runs)}", strategy)
            try:
                self._live(run, truth, self.runs[-1])
            except (AssertionError, subprocess.SubprocessError, OSError) as error:
                said = str(error)[:3000] or traceback.extract_tb(error.__traceback__)[-1].line
                self._fault(f"run {len(self.runs)}: {said}")
                shutil.copytree(run.home, self.folder / f"faulty-{len(self.runs)}", symlinks=True)
                self.cluster.mend()

    def _new_run(self, home: Path, strategy: str) -> JobRun:
        run = JobRun(home, self.source, **SETTINGS, **{"parallel.strategy": strategy})
        run.planted = self.folder / "planted"  # not on the disk that is filled
        return run

    def _truth(self, strategy: str) -> JobRun:
        """The run that nobody disturbs, without Slurm."""
        if strategy not in self.truths:
            self.truths[strategy] = self._new_run(self.folder / f"undisturbed-{strategy}", strategy)
            self.truths[strategy].run_to_end(Shape(strategy, 2))
        return self.truths[strategy]

    def _live(self, run: JobRun, truth: JobRun, result: dict[str, Any]) -> None:
        began, blows = time.monotonic(), len(self.blows)
        planted = f"pace@{PACE}"
        job = self.cluster.submit(run, "--nodes", "2", "--launcher", result["launcher"], "--time", str(MINUTES), "--lead", "60",
                                  planted=planted)
        scene = Scene(self.cluster, run, job, result["launcher"], planted, self.disk, self.checkout,
                      self.draw, self.submit, self.faults)
        self._until_it_trains(scene, 0, {})
        while time.monotonic() < self.ends and run.step() < CALM and not complete(run):
            time.sleep(self.draw.uniform(0.5, 6))
            self._strike(scene)
        result |= {"blows": len(self.blows) - blows}
        self._until_complete(scene)
        lives = read_lives(run)
        result |= {"seconds": round(time.monotonic() - began), "steps": run.step(), "lives": len(lives),
                   "how_they_ended": Counter(life["how"] for life in lives), "jobs": len({life["job"] for life in lives}),
                   "digest": run.latest().digest(), "digest_of_the_undisturbed_run": truth.latest().digest()}
        for number, life in enumerate(lives, 1):
            if life["how"] != "complete" and not life["reason"]:
                self._fault(f"run {len(self.runs)}: life {number} ended {life['how']} without a reason")
        check_same(run, truth)
        result["equal"] = True
        self._say(f"complete, equal: {len(lives)} lives, digest {result['digest'][:12]}")

    def _strike(self, scene: Scene) -> None:
        """The next blow, and what comes of it, unless the blow after it comes first: while the next life starts."""
        kind, run = self._next_kind(), scene.run
        lives, step = len(read_lives(run)), run.step()
        row = {"run": len(self.runs), "kind": kind, "at": round(time.monotonic() - self.began, 1), "step": step}
        self.blows.append(row)
        self._say(f"step {step}: {kind}")
        struck, ends = time.monotonic(), BLOWS[kind].ends_life
        hasty = ends and self._next_kind(stays=True) in EARLY and self.draw.random() < 0.5
        with BLOWS[kind].strike(scene):
            if hasty:
                self._until(scene, lambda: len(read_lives(run)) > lives or complete(run), row)
            else:
                self._until_it_trains(scene, lives, row, None if ends else run.step())
                row["seconds_to_next_step"] = round(time.monotonic() - struck, 1)
        ended = read_lives(run)[max(lives - 1, 0):]
        row["lives_ended"] = [{name: life[name] for name in ("how", "reason")} for life in ended if life["how"]]
        what = "; ".join(f"{life['how']} ({life['reason']})" for life in row["lives_ended"]) or "it trained on"
        then = "the next life starts" if hasty else f"{row['seconds_to_next_step']} s to step {run.step()}"
        self._say(f"    {then}: {what}")

    def _next_kind(self, stays: bool = False) -> str:
        """Of all that there are in turn, in another order each time."""
        if not self._bag:
            self._bag = self.draw.sample(self.kinds, len(self.kinds))
        return self._bag[-1] if stays else self._bag.pop()

    def _until_it_trains(self, scene: Scene, lives: int, row: dict[str, Any], step: int | None = None) -> None:
        """Until the run has trained a step in a life after so many; or beyond `step` in the same one.

        Args:
            row: where it is noted that the job had to be submitted again.
        """
        begun: dict[int, tuple[int, int]] = {}  # the metrics as a life began: they may be ahead of its checkpoint

        def trains() -> bool:
            now = read_lives(scene.run)
            if len(now) > lives:
                before = begun.setdefault(len(now), scene.run.metrics_version())
                return scene.run.metrics_version() != before and scene.run.step() > now[-1]["step"]
            return step is not None and scene.run.step() > step

        self._until(scene, lambda: trains() or complete(scene.run), row)

    def _until_complete(self, scene: Scene) -> None:
        self._until(scene, lambda: complete(scene.run), self.blows[-1] if self.blows else {})
        scene.job.end(seconds=PATIENCE)

    def _until(self, scene: Scene, condition: Any, row: dict[str, Any]) -> None:
        deadline, look = time.monotonic() + PATIENCE, 0.0
        while not condition():
            if time.monotonic() > look:
                if complete(scene.run):
                    pass
                elif has_ended(scene.job):
                    self._resubmit(scene, row)
                elif is_held(scene.job):
                    self._release(scene, row)
                look = time.monotonic() + 2
            assert time.monotonic() < deadline, f"no step for {PATIENCE:.0f} s\n{scene.job.output()[-2500:]}"
            time.sleep(0.05)

    def _resubmit(self, scene: Scene, row: dict[str, Any]) -> None:
        """As a user does whose job has ended, once he has read why."""
        folder, variables = str(scene.run.folder), self.cluster.variables(scene.run, scene.planted)
        if scene.job.id not in row.setdefault("resubmitted", {}):
            note = re.split(r"\s{2,}", self.submit(["slurm", "status", folder], variables).splitlines()[1])[-1]
            row["resubmitted"][scene.job.id] = note
            self._say(f"    the job has ended; status says: {note}")
            if ":" not in note and not note.startswith("cancelled"):
                self._fault(f"run {len(self.runs)}: job {scene.job.id} ended, and status says no more than '{note}'")
        try:
            scene.job = job_in(self.cluster, self.submit(["slurm", "resubmit", folder], variables))
        except AssertionError as refused:  # until it is sure that nobody is at work in the folder
            row.setdefault("refused", []).append(str(refused).strip().splitlines()[-1])
            self._say(f"    refused: {row['refused'][-1]}")

    def _release(self, scene: Scene, row: dict[str, Any]) -> None:
        """A controller that dies while it starts a job starts it once more when it is back. Slurm then holds the job, and
        drains the node for an administrator to look at."""
        folder, variables = str(scene.run.folder), self.cluster.variables(scene.run, scene.planted)
        note = re.split(r"\s{2,}", self.submit(["slurm", "status", folder], variables).splitlines()[1])[-1]
        row.setdefault("released", []).append(note)
        self._say(f"    the job is held; status says: {note}")
        for node in NODES:
            with suppress(AssertionError):  # which was not drained
                self.cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.submit(["slurm", "release", folder], variables)

    def _fault(self, line: str) -> None:
        self.faults.append(line)
        self._say(f"FAULT: {line}")

    def _say(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        which = f"run {len(self.runs)} ({self.runs[-1]['launcher']}, {self.runs[-1]['strategy']})"
        print(f"[{minutes:02d}:{seconds:02d}] {which}: {line}", file=sys.stderr, flush=True)

    def result(self) -> dict[str, Any]:
        """And whether all went as it must."""
        done = Counter(blow["kind"] for blow in self.blows)
        not_done = [kind for kind in self.kinds if not done[kind]]
        equal = bool(self.runs) and all(run["equal"] for run in self.runs)
        return {"equal": equal, "minutes": round((time.monotonic() - self.began) / 60, 1), "faults": self.faults,
                "kinds_not_done": not_done, "lives": sum(run.get("lives", 0) for run in self.runs),
                "resubmitted": sum(len(blow.get("resubmitted", ())) for blow in self.blows),
                "released": sum(len(blow.get("released", ())) for blow in self.blows),
                "kinds": {kind: summary([blow for blow in self.blows if blow["kind"] == kind]) for kind in self.kinds},
                "runs": self.runs, "blows": self.blows}


def summary(blows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sorted(blow["seconds_to_next_step"] for blow in blows if "seconds_to_next_step" in blow)
    return {"times": len(blows), "seconds_to_next_step": seconds}


def read_lives(run: JobRun) -> list[dict[str, Any]]:
    return run.document("jobs/lives.json").get("lives", [])


def complete(run: JobRun) -> bool:
    return run.document("ended.json").get("how") == "complete"


def has_ended(job: Job) -> bool:
    with suppress(AssertionError, subprocess.TimeoutExpired):  # a controller that is busy
        return job.ended()
    return False


def is_held(job: Job) -> bool:
    with suppress(AssertionError, subprocess.TimeoutExpired):
        details = job.details()
        return details["JobState"] == "PENDING" and "held" in details["Reason"].lower()
    return False


def clone(folder: Path) -> Path:
    """A copy of genscale, which somebody will change under the jobs."""
    for name in ("genscale", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@contextmanager
def disk_of(folder: Path) -> Iterator[Path]:
    """A small disk. The nodes see it since it is there before they are."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "storm", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="of blows; the last run then goes to its end")
    parser.add_argument("--only", nargs="+", choices=list(BLOWS), default=list(BLOWS), metavar="KIND", help=", ".join(BLOWS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="genscale-storm-"))
    os.environ["TMPDIR"] = str(folder)  # launchers that are killed leave their folders behind
    with disk_of(folder / "disk") as disk:
        checkout = clone(folder / "checkout")
        cluster = Cluster(folder / "slurm", partial(submit, checkout=checkout))
        try:
            result = circumstances(["torch", "accelerate"]) | {"slurm": cluster.slurm("sinfo", "--version").strip()}
            result |= {"load_before": os.getloadavg()[0], "seed": arguments.seed}
            storm = Storm(cluster, disk, folder, checkout, arguments.seed, arguments.minutes, arguments.only)
            try:
                storm.rage()
            except KeyboardInterrupt:
                storm.faults.append("interrupted")
            result |= storm.result()
            write(result, arguments.out)
        finally:
            cluster.stop()
    if failed := not result["equal"] or bool(result["faults"] or result["kinds_not_done"]):
        print(f"kept: {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
