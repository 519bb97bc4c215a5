"""A real Slurm on this machine, and tiny GPT runs as jobs in it; plain, for benchmarks/cluster_times.py uses it too."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fault_runs import ROOT, SETTINGS, Run, make_source

from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.testing.processes import FOREIGN

HERE = Path(__file__).parent
SCRIPT = HERE / "mini-cluster.sh"
PATIENCE = 120.0
"""Seconds that anything may take: this machine may be busy."""
NODES = ("node0", "node1", "node2")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"}
STEPS = 24
# Equal to 1e-5 whatever the shape: AdamW would magnify rounding once its warm-up is over.
PLAIN = {**SETTINGS["gpt"], "optimizer.name": "sgd", "optimizer.lr": 0.1, "schedule.name": "constant",
         "train.evaluate_every": 0, "train.steps": STEPS}
PLAIN.pop("train.micro_batch_size")  # what divides for one number of processes does not for another
Submit = Callable[[list[str], dict[str, str]], str]
"""Runs `genscale slurm submit` with some environment variables set (and others unset: those named with an empty value), and
returns what it printed."""


def why_not() -> str:
    """Why no cluster can be started here; empty where one can."""
    return subprocess.run([SCRIPT, "usable"], capture_output=True, text=True, timeout=60).stdout.strip()


class Cluster:
    """Three nodes of four CPUs and two fake GPUs (see mini-cluster.sh); `stop` it.

    Args:
        folder: for its state; a short path.
    """

    def __init__(self, folder: Path, submit: Submit) -> None:
        self.folder, self._submit = folder, submit
        self._site = folder / "site.yaml"
        self.environment = {**os.environ, "SLURM_MINI_DIR": str(folder), "SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        folder.mkdir(parents=True, exist_ok=True)
        self._site.write_text(yaml.safe_dump({"gpus_per_node": 0, "cpus_per_process": 1, "setup": [path]}))
        try:
            self.do("start")
        except BaseException:
            self.stop()
            raise

    def do(self, *words: str) -> str:
        """A verb of mini-cluster.sh."""
        # Not through pipes: the daemons that it starts would keep them open.
        with (self.folder / "said").open("w+") as said:
            done = subprocess.run([SCRIPT, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=said,
                                  stderr=subprocess.STDOUT, timeout=PATIENCE)
            said.seek(0)
            text = said.read()
        assert done.returncode == 0, f"mini-cluster.sh {' '.join(words)}: {text}"
        return text

    def stop(self) -> None:
        self.do("stop")

    def mend(self) -> None:
        """Whatever was broken goes again; jobs that are left are cancelled."""
        self.do("start-controller")
        for node in NODES:
            self.do("start-node", node)
        self.slurm("scancel", "--user=root")

    def slurm(self, *words: str) -> str:
        """What one of Slurm's own commands prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def variables(self, run: JobRun, planted: str = "") -> dict[str, str]:
        """The environment of whoever submits the run, as `Submit` takes it."""
        variables = {name: "" for name in os.environ if name.startswith((*FOREIGN, "SBATCH_"))}
        paths = os.pathsep.join([str(HERE / "planted"), str(ROOT)])
        return variables | {"SLURM_CONF": self.environment["SLURM_CONF"], "OMP_NUM_THREADS": "1", "PLANTED": planted,
                            "PLANTED_FOLDER": str(run.planted), "PYTHONPATH": paths}

    def submit(self, run: JobRun, *flags: str, planted: str = "", **others: str) -> Job:
        """A job of the run, with what happens to it: `genscale slurm submit`, in a shell with other variables too."""
        variables = self.variables(run, planted) | others
        words = ["slurm", "submit", "--config", str(run.config), "--site", str(self._site), "--time", "10", *flags]
        said = self._submit(words, variables)
        found = re.search(r"\bjob (\d+)", said)
        assert found, said
        return Job(self, found.group(1))

    def lives(self, node: str, pid: int) -> bool:
        """Whether that process of a node does."""
        try:
            self.do("exec", node, "kill", "-0", str(pid))
        except AssertionError:
            return False
        return True


class JobRun(Run):
    """A run that jobs make: its config file, its folder and what is planted in it."""

    def __init__(self, folder: Path, source: Path, **settings: Any) -> None:
        super().__init__(folder, {**PLAIN, "data.source": str(source), "run.dir": str(folder), **settings})
        self.config, self.planted = folder / f"{self.settings['run.name']}.yaml", folder / "planted"
        self.planted.mkdir(exist_ok=True)
        nested: dict[str, dict[str, Any]] = {}
        for key, value in self.settings.items():
            section, name = key.split(".")
            nested.setdefault(section, {})[name] = value
        self.config.write_text(yaml.safe_dump(nested))

    def element(self, number: int) -> JobRun:
        """Of an array over run.seed: the run that element `number` makes."""
        run = JobRun(self.home, self.settings["data.source"], **{"run.name": f"{self.settings['run.name']}-seed{number}"})
        run.planted = self.planted / str(number)
        return run

    def left(self, word: str, life: int = 0) -> set[str]:
        """Ranks whose process has left such a word (see planted/sitecustomize.py)."""
        return {path.name.rsplit("-", 1)[1] for path in self.planted.glob(f"{word}-{life}-*")}

    def steps_saved(self) -> list[int]:
        return [checkpoint.step for checkpoint in list_checkpoints(self.checkpoints)]

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder; empty where there is none."""
        with suppress(FileNotFoundError, ValueError):  # a heartbeat is written in place
            return json.loads((self.folder / name).read_text())
        return {}

    def owner(self) -> dict[str, Any]:
        """Who has the run folder (see genscale.supervise.run_owner)."""
        claims = sorted(path.name for path in (self.folder / ".owner").glob("0*.json"))
        return self.document(f".owner/{claims[-1]}") if claims else {}

    def processes(self) -> list[tuple[str, int]]:
        """Host and process id there, of every rank that lives."""
        beats = [self.document(f"logs/{path.name}") for path in sorted(self.folder.glob("logs/heartbeat-*.json"))]
        return [(beat["host"], beat["pid"]) for beat in beats if beat]

    def let_go(self, life: int = 0) -> None:
        """Whoever holds in that life goes on."""
        (self.planted / f"go-{life}").touch()


@dataclass(frozen=True)
class Job:
    """A job, or one element of an array: "17", "17_2"."""

    cluster: Cluster
    id: str

    def details(self) -> dict[str, str]:
        """As scontrol has them: JobState, Restarts, NodeList, BatchHost, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.slurm("scontrol", "-o", "show", "job", self.id)))

    @property
    def state(self) -> str:
        return self.details()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.details()["Restarts"])

    def steps(self) -> set[str]:
        """Those that Slurm has not seen the end of: "batch", "0", ..."""
        found = self.cluster.slurm("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={self.id}").split()
        return {step.rpartition(".")[2] for step in found}

    def output(self) -> str:
        """What its script and its processes have printed, in all of its lives."""
        file = Path(self.details()["StdOut"])
        return file.read_text(errors="replace") if file.exists() else ""

    def signal(self, name: str) -> None:
        self.cluster.slurm("scancel", f"--signal={name}", self.id)

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        """Until the condition holds. AssertionError where the job has ended, or nothing happens."""
        deadline, look = time.monotonic() + seconds, 0.0
        while not condition():
            if time.monotonic() > look:  # not with every look: each is a process
                ended = self.ended()
                assert not ended or condition(), f"job {self.id} has ended, and not: {what}\n{self.output()[-6000:]}"
                look = time.monotonic() + 2
            assert time.monotonic() < deadline, f"job {self.id}, in {seconds:.0f} s not: {what}\n{self.output()[-6000:]}"
            time.sleep(0.05)

    def ended(self) -> bool:
        """For good: a job that is to be requeued may be called failed for a moment."""
        if self.state not in ENDED:
            return False
        time.sleep(1)
        return self.state in ENDED

    def end(self, state: str = "COMPLETED", seconds: float = PATIENCE) -> dict[str, str]:
        """Wait for the end, which must be that; its details."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            assert time.monotonic() < deadline, f"job {self.id} still is {self.state}\n{self.output()[-6000:]}"
            time.sleep(0.3)
        details = self.details()
        assert details["JobState"] == state, f"job {self.id}: {details['JobState']}, not {state}\n{self.output()[-6000:]}"
        return details


@contextmanager
def variables_set(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables of this process, for a while; an empty value unsets one."""
    before = dict(os.environ)
    os.environ.update(variables)
    for name, value in variables.items():
        if not value:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def text_source(folder: Path) -> Path:
    return make_source("gpt", folder)
