"""What a fault is tried on: a run that nobody disturbs and runs to be disturbed, of one family under one strategy."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from fault_runs import ROOT, SETTINGS, Life, Run, Shape, make_source, wait_for

STEPS = 30
PLANTED = Path(__file__).parent / "planted"


class NoDisk(Exception):
    """A small disk cannot be mounted here."""


class Bench:
    """One family under one strategy on two processes."""

    def __init__(self, family: str, strategy: str, folder: Path) -> None:
        self.family, self.shape, self.folder, self.count = family, Shape(strategy, 2), folder, 0
        self.settings = {**SETTINGS[family], "train.steps": STEPS, "train.checkpoint_keep": 4,
                         "data.source": make_source(family, folder / "source")}

    @cached_property
    def truth(self) -> Run:
        """The run that nobody disturbed."""
        run = Run(self.folder / "undisturbed", self.settings)
        run.run_to_end(self.shape, launcher=False)
        return run

    def run(self, home: Path | None = None, **settings: Any) -> Run:
        """A new run with the same settings, and some others; in a `home` of its own."""
        self.count += 1
        scratch = self.folder / f"run-{self.count}"
        return Run(home or scratch, {**self.settings, **settings}, scratch)

    def copy(self, home: Path | None = None) -> Run:
        """A run that has ended, to do harm to and to take up again."""
        run = self.run(home)
        shutil.copytree(self.truth.folder, run.folder)
        return run


Case = Callable[[Bench, random.Random], float]


def wait_for_step(run: Run, life: Life, step: int) -> None:
    assert wait_for(lambda: run.step() >= step, life, 0.002), life.output()[-5000:]


def go_on(run: Run, shape: Shape, since: float, **variables: str) -> float:
    """Start the run again and let it end; the seconds until it trained a step."""
    done = run.latest().step
    before = run.metrics_version()
    life = run.start(shape, **variables)
    try:
        wait_for(lambda: run.metrics_version() != before and run.step() > done, life, 0.005)
        seconds = time.monotonic() - since
        end(life, 0)
        return seconds
    finally:
        life.kill()


def end(life: Life, code: int) -> str:
    """Wait for the end, which must be that code's, without a process left behind; what was printed."""
    life.wait_until_gone()
    output = life.output()
    assert life.process.returncode == code, f"exit code {life.process.returncode}, not {code}\n{output[-5000:]}"
    return output


@contextmanager
def living(run: Run, shape: Shape, **variables: str) -> Iterator[Life]:
    life = run.start(shape, **variables)
    try:
        yield life
    finally:
        life.kill()


def refusal(run: Run, shape: Shape) -> tuple[str, float]:
    """Start a run that must end with code 2 before it trains a step; its one error line, and the seconds to the end."""
    before = run.step()
    with living(run, shape) as life:
        message = one_error(end(life, 2))
        seconds = time.monotonic() - life.started
    assert run.step() == before
    return message, seconds


def one_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output[-5000:]
    return lines[0]


def planted(fault: str, rank: int, step: int) -> dict[str, str]:
    return {"PLANTED_FAULT": fault, "PLANTED_RANK": str(rank), "PLANTED_STEP": str(step),
            "PYTHONPATH": os.pathsep.join([str(PLANTED), str(ROOT)])}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size: a tmpfs, which takes the right to mount one (NoDisk)."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, timeout=20, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoDisk(f"a tmpfs cannot be mounted here ({error})") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, timeout=20)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"0" * 2**16)
            except OSError:
                return
