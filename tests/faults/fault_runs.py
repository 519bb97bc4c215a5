"""Tiny real runs to be broken: `genscale train` in processes of its own, what it leaves in its folder, who is still alive."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.testing import runs
from genscale.testing.processes import GENSCALE, clean_environment, group

ROOT = Path(__file__).resolve().parents[2]
MARKER = "GENSCALE_FAULT_MARKER"
PATIENCE = 240.0
"""Seconds that a life may go without a new step, and processes without ending: this machine may be busy."""
TIMES = ("_seconds", "_per_second", "mfu", "data_wait_share", "retries")
"""Endings of the metrics that differ between two equal runs."""
COMMON: dict[str, Any] = {
    "run.name": "run", "data.lanes": 12, "train.global_batch_size": 12, "train.log_every": 1, "train.checkpoint_every": 3,
    "train.checkpoint_keep": 2, "train.evaluate_every": 10, "train.precision": "fp32", "optimizer.lr": 1e-3,
    "tracking.wandb": "disabled",
}  # fmt: skip
REWARD: dict[str, Any] = {
    **COMMON, "train.micro_batch_size": 2, "model.family": "reward", "model.from": "scratch", "model.layers": 2,
    "model.heads": 2, "model.width": 32, "model.positions": 32, "data.prompt_tokens": 16, "data.row_bytes": 64,
    "data.validation_prompts": 2, "objective.tokens": 8, "objective.group": 4,
}  # fmt: skip
IMAGES: dict[str, Any] = {**COMMON, "data.size": 16, "data.channels": 1, "train.ema_half_life": 100}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt": {**COMMON, "train.micro_batch_size": 2, "model.layers": 2, "model.heads": 2, "model.width": 32,
            "model.positions": 32, "data.sequence_length": 32, "data.validation_blocks": 2},
    "dcgan": {**IMAGES, "model.family": "dcgan", "model.width": 4, "model.latent": 8, "train.clip": 0},
    "vae": {**IMAGES, "model.family": "vae", "model.width": 8, "model.multipliers": "[1,2]", "model.latents": 4},
    "reward": {**REWARD, "objective.rewards": '[{"name": "length", "target": 5}]'},
    "reward-http": REWARD,  # with what random_judge.py says of a server
}  # fmt: skip


def make_source(family: str, folder: Path) -> Path:
    """What the family trains on, in a new `folder`: 8 kB of text, 60 prompts, or 84 images that are all different; a few
    steps an epoch."""
    folder.mkdir(parents=True)
    if family.startswith("reward"):
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(60)))
        return path
    if family == "gpt":
        from pydoc_data.topics import topics

        path = folder / "text.txt"
        path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:8_000])
        return path
    draw = np.random.default_rng(0)
    for part, count in (("train", 84), ("test", 80)):
        images = draw.integers(0, 256, (count, 16, 16), np.uint8)
        np.savez(folder / f"{part}.npz", images=images, labels=np.arange(count) % 2)
    return folder


@dataclass
class Life:
    """A `genscale train` from its start to its end, however that comes."""

    folder: Path
    process: subprocess.Popen
    marker: str
    started: float
    known: set[psutil.Process] = field(default_factory=set)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ranks(self) -> list[psutil.Process]:
        """Its training processes by rank; fewer than there will be while it starts."""
        found: dict[int, psutil.Process] = {}
        for process in self.family():
            # Read once: it is another one between a fork and its exec.
            with suppress(psutil.Error):
                if rank := process.environ().get("RANK"):
                    found.setdefault(int(rank), process)
        return [found[rank] for rank in sorted(found)]

    def family(self) -> list[psutil.Process]:
        """The launcher, and whoever it has started."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            self.known |= {launcher, *launcher.children(recursive=True)}
        return [process for process in self.known if process.is_running()]

    def output(self) -> str:
        """What it has printed."""
        return (self.folder / f"output-{self.marker}.txt").read_text(errors="replace")

    def wait_until_gone(self, seconds: float = PATIENCE) -> float:
        """Seconds until none of its processes is left, found by a mark in their environment: who was orphaned too.

        Raises AssertionError where some stay behind; they are killed.
        """
        begun = time.monotonic()
        while (left := marked(self.marker)) or not self.ended():
            if time.monotonic() > begun + seconds:
                names = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left]
                self.kill()
                raise AssertionError(f"left behind after {seconds} s: {names}\n{self.output()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - begun

    def kill(self) -> None:
        """SIGKILL to whatever is left of it."""
        for process in {*self.family(), *marked(self.marker)}:
            with suppress(psutil.Error):
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)


def marked(marker: str) -> list[psutil.Process]:
    """Living processes with that mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == marker:
                found.append(process)
    return found


@dataclass(frozen=True)
class Shape:
    """How a run is spread."""

    strategy: str
    processes: int


class Run:
    """A run in `folder`, started as often as it takes.

    Args:
        folder: of its own; the run folder will be `folder`/run.
        settings: flags of `genscale train` without run.dir and strategy.
        scratch: for what the lives print and their temporary files (default: `folder`).
    """

    def __init__(self, folder: Path, settings: dict[str, Any], scratch: Path | None = None) -> None:
        self.home, self.settings, self.scratch = folder, settings, scratch or folder
        (self.scratch / "tmp").mkdir(parents=True, exist_ok=True)
        self.folder = folder / settings["run.name"]
        self.checkpoints, self.metrics_file = self.folder / "checkpoints", self.folder / "metrics.jsonl"

    def words(self) -> list[str]:
        """The settings as a command line has them."""
        return runs.flags(self.settings)

    def start(self, shape: Shape, launcher: bool = True, **variables: str) -> Life:
        """Start it, from nothing or from where it is; without its launcher where that is not looked at, for it takes time."""
        marker, several = uuid.uuid4().hex, shape.processes > 1
        command = [*(GENSCALE if launcher or not several else group(shape.processes, *GENSCALE[1:])), "train"]
        command += ["--processes", str(shape.processes)] if launcher and several else []
        command += [*self.words(), "--run.dir", str(self.home), "--parallel.strategy", shape.strategy]
        # A launcher that is killed outright leaves its temporary folder behind.
        environment = clean_environment({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                         "TMPDIR": str(self.scratch / "tmp"), MARKER: marker, **variables})
        with (self.scratch / f"output-{marker}.txt").open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        return Life(self.scratch, process, marker, time.monotonic())

    def run_to_end(self, shape: Shape, launcher: bool = True) -> float:
        """A whole life, which must go well. Returns the seconds to its first step."""
        life = self.start(shape, launcher)
        try:
            wait_for(lambda: self.step() > 0, life)
            seconds = time.monotonic() - life.started
            wait_for(life.ended, life)
            assert life.process.returncode == 0, life.output()[-5000:]
            life.wait_until_gone(30)
            return seconds
        finally:
            life.kill()

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, without times."""
        lines = runs.Run(self.folder).metrics()
        return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]

    def metrics_version(self) -> tuple[int, int]:
        """Another one once metrics.jsonl is written anew; an inode alone may come back with the second of two rewrites."""
        with suppress(FileNotFoundError):
            found = os.stat(self.metrics_file)
            return found.st_ino, found.st_mtime_ns
        return 0, 0

    def step(self) -> int:
        """The last step of a whole training line; 0 without one."""
        with suppress(FileNotFoundError, ValueError, KeyError):
            with self.metrics_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"]) if lines else 0
        return 0

    def unfinished(self) -> set[tuple[str, int]]:
        """Checkpoints (name and inode) that are not committed: one that is being written, those whose writer was killed."""
        with suppress(FileNotFoundError), os.scandir(self.checkpoints) as entries:
            return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith(".")}
        return set()

    def saved(self) -> int:
        """The step of the latest checkpoint, whole or not; 0 without one."""
        return max((checkpoint.step for checkpoint in list_checkpoints(self.checkpoints)), default=0)

    def latest(self) -> Checkpoint | None:
        """The latest checkpoint; AssertionError where any of those on the disk is not whole."""
        found = list_checkpoints(self.checkpoints)
        problems = {checkpoint.path.name: checkpoint.problem() for checkpoint in found}
        assert not any(problems.values()), problems
        return found[-1] if found else None

    def leftovers(self) -> list[str]:
        """What does not belong into the folder of a run that has ended well."""
        unfinished = [path for path in self.folder.rglob(".*") if path.name != ".owner"]
        temporary = [path for pattern in ("*.tmp", "*.lock") for path in self.folder.rglob(pattern)]
        return sorted(str(path.relative_to(self.folder)) for path in [*unfinished, *temporary, *self.folder.glob("previous-*")])


def wait_for(condition: Callable[[], bool], life: Life, interval: float = 0.02, seconds: float = PATIENCE) -> bool:
    """Wait until the condition holds (True) or the life has ended (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if life.ended():
            return condition()
        if time.monotonic() > deadline:
            output = life.output()
            life.kill()
            raise AssertionError(f"nothing happened for {seconds} s\n{output[-5000:]}")
        time.sleep(interval)
    return True


def training_lines(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (line for line in lines if "data_digest" in line)
