"""A run folder as jobs of Slurm leave it, without a Slurm; programs in the place of its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from genscale.cluster.checks import Check


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    """Whoever runs the tests may have a site of their own, or run them in a job."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "GENSCALE_", "LOCAL_WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def in_job(monkeypatch) -> Callable[..., None]:
    """`in_job("7", restart=1)`: this process is in that life of that job, on a node of this machine."""

    def enter(job: str, restart: int = 0, array: str | None = None, **others: str) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURMD_NODENAME", "node0")
        monkeypatch.setenv("GENSCALE_NODES", "node0")
        if restart:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        else:
            monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        if array:
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array.partition("_")[0])
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", array.partition("_")[2])
        for name, value in others.items():
            monkeypatch.setenv(name, value)

    return enter


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def say_ended(run) -> Callable[..., None]:
    """ended.json, as a run writes it."""

    def write(how: str, code: int = 0, step: int = 0, **others: Any) -> None:
        said = {"how": how, "signal": None, "step": step, "exit_code": code, "reason": None, "rank": 0, **others}
        (run / "ended.json").write_text(json.dumps(said))

    return write


@pytest.fixture
def checkpoint_at(run) -> Callable[[int], None]:
    """The folder of a checkpoint."""

    def make(step: int) -> None:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    return make


@pytest.fixture
def one() -> Callable[[Iterable[Check], str], Check]:
    """The only check of that name."""

    def find(checks: Iterable[Check], name: str) -> Check:
        (found,) = [check for check in checks if check.name == name]
        return found

    return find


@pytest.fixture
def tool(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """`tool(name, script)`: a program in front of the PATH, in the place of one that this machine has not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make
