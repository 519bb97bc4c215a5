"""What befalls a job in a storm (cluster_storm.py). Each blow is struck before its `yield`; after it, once
the run trains again, what it has broken is mended."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import cluster_times  # noqa: F401 (it adds the paths of the cluster's tests)

from cluster_jobs import Cluster, Job, JobRun  # isort: skip

MINUTES = 30
"""Time limit of a job that is left alone."""
PATIENCE = 150.0
"""Seconds that what a blow waits for may take: a stop, a start, the end of a job."""
LEAK = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_CPU": "100",
        "SLURM_TIME_FORMAT": "relative", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_OPEN_MODE": "truncate",
        "SQUEUE_STATES": "COMPLETED", "GENSCALE_STOP_AT": "1", "RANK": "1", "WORLD_SIZE": "8", "MASTER_PORT": "1"}
"""The shell of somebody with habits, inside of another run's process, in the third life of an array's element."""


@dataclass
class Scene:
    """Whom a blow meets.

    Attributes:
        launcher: accelerate or srun.
        planted: what is planted in its processes (see tests/cluster/planted).
        disk: that the run folder is on, and nothing else.
        checkout: of genscale, which jobs are submitted from.
        genscale: what `genscale` prints, in a shell with these variables.
        faults: what a blow has found to be wrong.
    """

    cluster: Cluster
    run: JobRun
    job: Job
    launcher: str
    planted: str
    disk: Path
    checkout: Path
    draw: random.Random
    genscale: Callable[[list[str], dict[str, str]], str]
    faults: list[str] = field(default_factory=list)

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE, each: Callable[[], object] = int) -> None:
        """Until it holds or the time is up; what comes then is for the storm to judge. `each`: done at every look."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            each()
            time.sleep(0.25)

    def stop_the_run(self) -> None:
        self.job.signal("USR1")
        self.until_stopped()

    def until_stopped(self) -> None:
        self.until(lambda: self.run.document("ended.json") or self.state() != "RUNNING")

    def state(self) -> str:
        with suppress(AssertionError, subprocess.TimeoutExpired):  # a controller that is busy
            return self.job.state
        return "RUNNING"

    def ranks(self) -> list[tuple[str, int]]:
        """Host and process id there, by rank."""
        while len(found := self.run.processes()) != 2:  # a heartbeat is written in place
            time.sleep(0.1)
        return found

    def wait(self, least: float, most: float, each: Callable[[], object] = int) -> None:
        """So many seconds."""
        self.until(lambda: False, self.draw.uniform(least, most), each)

    def lives(self) -> int:
        return len(self.run.document("jobs/lives.json").get("lives", ()))

    def end_of_life(self) -> None:
        """Until the job is in the queue again, or has ended."""
        self.until(lambda: self.state() not in ("RUNNING", "COMPLETING"))


def job_in(cluster: Cluster, said: str) -> Job:
    """The job that was submitted, by what was said."""
    found = re.search(r"submitted job (\d+)", said)
    assert found, said
    return Job(cluster, found[1])


@dataclass(frozen=True)
class Blow:
    """Attributes:
        ends_life: whether the job has to start again, or may train on.
    """

    strike: Callable[[Scene], AbstractContextManager[None]]
    ends_life: bool


BLOWS: dict[str, Blow] = {}


def blow(kind: str, ends_life: bool = True) -> Callable[[Callable[[Scene], Iterator[None]]], None]:
    def register(strike: Callable[[Scene], Iterator[None]]) -> None:
        BLOWS[kind] = Blow(contextmanager(strike), ends_life)
    return register


# --- by Slurm ---------------------------------------------------------------------------------------------------------------

@blow("time limit")
def _(scene: Scene) -> Iterator[None]:
    """It becomes so short that the signal is due, which Slurm looks for twice a minute."""
    hours, minutes, _ = scene.job.details()["RunTime"].rpartition("-")[2].split(":")
    scene.cluster.slurm("scontrol", "update", f"JobId={scene.job.id}", f"TimeLimit={60 * int(hours) + int(minutes) + 1}")
    scene.until_stopped()
    scene.cluster.slurm("scontrol", "update", f"JobId={scene.job.id}", f"TimeLimit={MINUTES}")
    yield


@blow("preemption")
def _(scene: Scene) -> Iterator[None]:
    scene.cluster.slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    yield


@blow("SIGUSR1")
def _(scene: Scene) -> Iterator[None]:
    scene.job.signal("USR1")
    yield


@blow("controller away", ends_life=False)
def _(scene: Scene) -> Iterator[None]:
    scene.cluster.do("kill-controller")
    scene.wait(2, 12)
    scene.cluster.do("start-controller")
    yield


@blow("controller away as the job wants to be requeued")
def _(scene: Scene) -> Iterator[None]:
    scene.cluster.do("kill-controller")
    for host, pid in scene.ranks():
        scene.cluster.do("exec", host, "kill", "-USR1", str(pid))
    scene.until(lambda: scene.run.document("ended.json"), 60)
    scene.wait(2, 12)
    scene.cluster.do("start-controller")
    yield


# --- of nodes and processes -------------------------------------------------------------------------------------------------

def _lose(verb: str, rank: int) -> Callable[[Scene], Iterator[None]]:
    def strike(scene: Scene) -> Iterator[None]:
        host, lives = scene.ranks()[rank][0], scene.lives()
        scene.cluster.do(verb, host)
        with ThreadPoolExecutor(1) as aside:  # the run trains meanwhile
            scene.until(lambda: scene.lives() > lives)
            mended = aside.submit(scene.cluster.do, "start-node", host)
            yield
            mended.result()
    return strike


for _rank, _whose in ((0, "the first node"), (1, "the last node")):
    blow(f"power cut of {_whose}")(_lose("cut-power", _rank))
    blow(f"network split from {_whose}")(_lose("split", _rank))


@blow("kill -9 of a rank")
def _(scene: Scene) -> Iterator[None]:
    host, pid = scene.draw.choice(scene.ranks())
    scene.cluster.do("exec", host, "kill", "-9", str(pid))
    yield


@blow("kill -9 of a launcher")
def _(scene: Scene) -> Iterator[None]:
    """accelerate launch on one of the nodes; else srun, whose two processes are in the job's script."""
    host, pid = scene.draw.choice(scene.ranks())
    look = ("ps", "-o", "ppid=", "-p", str(pid))
    if scene.launcher == "srun":
        host, look = scene.job.details()["BatchHost"], ("pgrep", "-x", "srun")
    with suppress(AssertionError):  # of srun's two processes the second may end with the first
        scene.cluster.do("exec", host, "kill", "-9", *scene.cluster.do("exec", host, *look).split())
    yield


# --- of the disk ------------------------------------------------------------------------------------------------------------

@contextmanager
def _full(disk: Path) -> Iterator[Callable[[], None]]:
    """A full disk, and what fills it again when something was deleted."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        def fill() -> None:
            for size in (2**20, 2**12):
                with suppress(OSError):
                    while filler.write(bytes(size)):
                        pass
        fill()
        try:
            yield fill
        finally:
            (disk / "filler").unlink()


@blow("full disk at a checkpoint", ends_life=False)
def _(scene: Scene) -> Iterator[None]:
    with _full(scene.disk) as fill:
        scene.wait(5, 12, fill)
    yield


@blow("full disk at slurm end")
def _(scene: Scene) -> Iterator[None]:
    scene.stop_the_run()
    with _full(scene.disk) as fill:
        scene.wait(4, 30, fill)
    yield


@blow("full disk at a stop and slurm end")
def _(scene: Scene) -> Iterator[None]:
    with _full(scene.disk) as fill:
        scene.job.signal("USR1")
        scene.wait(4, 30, fill)
    yield


@blow("full disk at slurm begin")
def _(scene: Scene) -> Iterator[None]:
    scene.stop_the_run()
    scene.end_of_life()
    with _full(scene.disk) as fill:
        scene.until(lambda: scene.state() != "PENDING", each=fill)
        scene.wait(5, 25, fill)
    yield


@blow("jobs/ cannot be written to")
def _(scene: Scene) -> Iterator[None]:
    jobs = str(scene.run.folder / "jobs")
    subprocess.run(["chattr", "+i", jobs], check=True)
    try:
        scene.stop_the_run()
        scene.wait(3, 30)
    finally:
        subprocess.run(["chattr", "-i", jobs], check=True)
    yield


# --- by the user ------------------------------------------------------------------------------------------------------------

@contextmanager
def _moved(scene: Scene) -> Iterator[None]:
    """The run folder is elsewhere; whatever is in its place when it comes back is a fault."""
    folder, away = scene.run.folder, scene.run.home / "moved-away"
    folder.rename(away)
    try:
        yield
    finally:
        if folder.exists():
            left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
            scene.faults.append(f"in the place of the run folder that was moved away: {', '.join(left) or 'an empty folder'}")
            folder.rename(scene.run.home / f"left-{time.time():.0f}")
        away.rename(folder)


@blow("run folder moved for a moment", ends_life=False)
def _(scene: Scene) -> Iterator[None]:
    with _moved(scene):
        scene.wait(0.5, 3)
    yield


@blow("run folder moved until the job ends")
def _(scene: Scene) -> Iterator[None]:
    with _moved(scene):
        scene.until(scene.job.ended)
    yield


@blow("run folder moved between two lives")
def _(scene: Scene) -> Iterator[None]:
    scene.stop_the_run()
    scene.end_of_life()
    with _moved(scene):
        scene.until(lambda: scene.state() != "PENDING")
        scene.until(scene.job.ended, 40)
    yield


@blow("leaking environment")
def _(scene: Scene) -> Iterator[None]:
    """The job is cancelled, and submitted again from inside of another one, in a shell with variables of others."""
    variables = scene.cluster.variables(scene.run, scene.planted)
    scene.genscale(["slurm", "cancel", str(scene.run.folder)], variables)
    scene.until(scene.job.ended)
    command = ["srun", "--nodes=1", "--ntasks=1", "env", *(f"{name}={value}" for name, value in LEAK.items()),
               sys.executable, "-m", "genscale", "slurm", "resubmit", str(scene.run.folder)]
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    done = subprocess.run(command, cwd=scene.checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    scene.job = job_in(scene.cluster, done.stdout)
    yield


@blow("code changed between two lives")
def _(scene: Scene) -> Iterator[None]:
    """As by somebody who pulls a commit that is broken, and one later that is not."""
    code, launch = scene.checkout / "genscale" / "cli.py", scene.checkout / "launch"
    before, away = code.read_text(), scene.checkout / "launch-away"
    code.write_text("raise SystemExit('the code has changed')\n")
    launch.rename(away)
    try:
        scene.stop_the_run()
        yield
    finally:
        code.write_text(before)
        away.rename(launch)
