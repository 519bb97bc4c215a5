"""Programs that train, each in processes of its own as its users start it, and take turns (gate/sitecustomize.py)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import ROOT, foreign_cores
from turns import Turn, orders

import psutil

GATE = ROOT / "benchmarks" / "gate"
# How threads wait, how memory is kept, and what a launcher or another run left in this shell: each program's own affair.
FOREIGN = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "ACCELERATE_", "WANDB_", "RANK",
           "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "DS_", "PYTHONPATH", "STEP_", "GENSCALE_")
START_SECONDS = 300
PAUSE_SECONDS = 0.03
"""Before a turn: by then the threads of whoever was last, which spin for some milliseconds, sleep."""
TURN_SECONDS = 0.2
WARMUP_STEPS = 3


class Failed(Exception):
    """A contestant ended before it should. The message is the end of what it printed."""


@dataclass(frozen=True)
class Program:
    """A command, and what its process sees.

    Attributes:
        folder: where it runs.
        packages: folders on its PYTHONPATH.
        processes: that take steps.
    """

    command: list[str]
    folder: Path
    packages: list[Path] = field(default_factory=list)
    threads: int | None = None
    processes: int = 1

    def start(self, scratch: Path, **variables: str) -> subprocess.Popen:
        """Its process; what it prints goes to `<scratch>/output.txt`."""
        scratch.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, [GATE, *self.packages])), "HF_HUB_OFFLINE": "1",
                        "TMPDIR": str(scratch), **variables}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        command = [word.replace("{scratch}", str(scratch)) for word in self.command]
        with (scratch / "output.txt").open("w") as output:
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=subprocess.STDOUT)


class Contestant:
    """A program that has been started and waits at its gate after its first step.

    Attributes:
        first_step: seconds from its start to the end of its first step, and the CPU time of its training processes until then.
        parameters: of the networks that it trains (of one process, after a turn).
    """

    def __init__(self, program: Program, scratch: Path) -> None:
        self.scratch, self.program, self.parameters = scratch, program, 0
        scratch.mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(scratch / "gate"))
        self._listener.listen()
        self._listener.settimeout(1)
        self._gates: list[Any] = []
        self._began = time.monotonic()
        self._process = program.start(scratch, STEP_GATE=str(scratch / "gate"))
        self._known: set[psutil.Process] = set()

    def wait_until_ready(self) -> None:
        said = []
        while len(self._gates) < self.program.processes:
            if self._process.poll() is not None or time.monotonic() > self._began + START_SECONDS:
                raise Failed(self.output()[-3000:])
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(None)
                self._gates.append(connection.makefile("rw"))
                said.append(json.loads(self._gates[-1].readline()))
        self.first_step = Turn(max(each["at"] for each in said) - self._began, sum(each["cpu_seconds"] for each in said))
        self.trainers = [psutil.Process(each["pid"]) for each in said]
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known = {*psutil.Process(self._process.pid).children(recursive=True)}

    def turn(self, steps: int) -> Turn:
        """Its next steps: of all its processes the longest time, and the sum of CPU times, by step."""
        for gate in self._gates:
            gate.write(f"{steps}\n")
            gate.flush()
        lines = [gate.readline() for gate in self._gates]
        if not all(lines):
            raise Failed(self.output()[-3000:])
        said = [json.loads(line) for line in lines]
        self.parameters = said[0]["parameters"]
        return Turn(max(each["seconds"] for each in said) / steps, sum(each["cpu_seconds"] for each in said) / steps)

    def output(self) -> str:
        return (self.scratch / "output.txt").read_text(errors="replace")

    def close(self) -> None:
        """Ends it, and whatever it has started."""
        for gate in self._gates:
            with contextlib.suppress(OSError):
                gate.close()
        self._listener.close()  # refuses whoever comes later
        if len(self._gates) < self.program.processes:
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for left in self._known:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def race(programs: dict[str, Program], scratch: Path, seconds: float, unit: int = 1) \
        -> tuple[dict[str, list[Turn]], dict[str, Any]]:
    """The turns of programs that run side by side, each asleep while another steps, and what else there is to say.

    A turn is as many steps as last TURN_SECONDS (at least one, and a multiple of `unit`), after one that does not count where
    there are several: the threads of a program that has slept have to wake. What a loader reads ahead in its own thread while
    the program is asleep is no part of a step; with several steps to a turn it has to keep up.

    Args:
        seconds: of all rounds together; there are five at least.

    Raises:
        Failed: one of them has ended.
    """
    running: dict[str, Contestant] = {}
    try:
        for name, program in programs.items():  # one after the other: ours asks how busy the machine is as it starts
            running[name] = Contestant(program, scratch / name)
            running[name].wait_until_ready()
        slowest = 0.0
        for contestant in running.values():
            contestant.turn(WARMUP_STEPS * unit)
            slowest = max(slowest, contestant.turn(unit).seconds)
        steps = max(1, round(TURN_SECONDS / slowest / unit)) * unit
        turns: dict[str, list[Turn]] = {name: [] for name in programs}
        others = foreign_cores(trainer for contestant in running.values() for trainer in contestant.trainers)
        deadline = time.monotonic() + seconds
        for order in orders(list(programs)):
            for name in order:
                time.sleep(PAUSE_SECONDS)
                if steps > 1:
                    running[name].turn(1)
                turns[name].append(running[name].turn(steps))
            if time.monotonic() > deadline and len(turns[name]) >= 5:
                break
        about = {"steps_in_a_turn": steps, "parameters": {name: each.parameters for name, each in running.items()},
                 "cores_busy_with_others": others()}
        return turns, about
    finally:
        for contestant in running.values():
            contestant.close()


def first_steps(programs: dict[str, Program], scratch: Path, rounds: int) -> dict[str, list[Turn]]:
    """Seconds from a command to the end of its first step, one command after the other; the first round does not count, for it
    reads files that the others find in memory."""
    turns: dict[str, list[Turn]] = {name: [] for name in programs}
    for number, order in zip(range(rounds + 1), orders(list(programs)), strict=False):
        for name in order:
            contestant = Contestant(programs[name], scratch / f"{number}-{name}")
            try:
                contestant.wait_until_ready()
            finally:
                contestant.close()
            if number:
                turns[name].append(contestant.first_step)
    return turns


def whole_command(program: Program, scratch: Path, first: int, last: int) -> Turn:
    """A command from its start to its end, with nobody beside: what a step takes after `first`, up to `last`. Raises Failed."""
    process = program.start(scratch, STEP_STAMPS=str(scratch / "stamps.txt"))
    if process.wait():
        raise Failed((scratch / "output.txt").read_text(errors="replace")[-3000:])
    stamps = [[float(word) for word in line.split()] for line in (scratch / "stamps.txt").read_text().splitlines()]
    seconds, cpu_seconds = (end - begin for begin, end in zip(stamps[first - 1], stamps[last - 1], strict=True))
    return Turn(seconds / (last - first), cpu_seconds / (last - first))
