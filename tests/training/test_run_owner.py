"""One run at a time in a folder; whoever is dead lets go of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from genscale.errors import UserError
from genscale.supervise import run_owner
from genscale.supervise.ending import Ending
from genscale.supervise.run_owner import Fenced, RunOwner

ROOT = Path(__file__).resolve().parents[2]
# Claims the folder once the gun goes off, says what came of it, and lives on until its input ends.
RUNNER = """
import errno, os, sys, time
from pathlib import Path
from genscale.errors import UserError
from genscale.supervise.run_owner import RunOwner
def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")

gun = Path(sys.argv[2])
if sys.argv[3] == "without":
    os.link = no_links
print("ready", flush=True)
while not gun.exists(): time.sleep(0.0005)
try:
    owner = RunOwner(Path(sys.argv[1]), print)
    print("owner", flush=True)
except UserError as error:
    print("refused", error, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def starters(tmp_path: Path):
    """`starters(10)`: so many processes that claim `<tmp_path>/run` at the same instant; returns what each said."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int, links: str = "with") -> list[str]:
        (tmp_path / "run").mkdir(exist_ok=True)
        gun = tmp_path / f"gun-{len(started)}"
        command = [sys.executable, "-c", RUNNER, str(tmp_path / "run"), str(gun), links]
        new = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(count)]
        started.extend(new)
        for process in new:
            assert process.stdout.readline() == "ready\n"
        gun.touch()
        return [process.stdout.readline() for process in new]

    start.processes = started
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_of_ten_that_start_at_once_one_has_the_folder_and_kill_9_frees_it(starters, tmp_path):
    said = starters(10)
    (winner,) = [process for process, line in zip(starters.processes, said, strict=True) if line == "owner\n"]
    refused = [line for line in said if line.startswith("refused")]
    assert len(refused) == 9
    assert all(str(tmp_path / "run") in line and f"process {winner.pid} on {socket.gethostname()}" in line for line in refused)
    with pytest.raises(UserError, match=f"belongs to a run that goes on: process {winner.pid} .*, since 20"):
        RunOwner(tmp_path / "run", print)
    winner.kill()
    winner.wait()
    started = time.monotonic()
    RunOwner(tmp_path / "run", print)
    assert time.monotonic() - started < 2
    assert len(list((tmp_path / "run" / ".owner").iterdir())) == 1


def test_on_a_file_system_without_hard_links_one_has_the_folder_too(starters):
    said = starters(4, links="without")
    assert said.count("owner\n") == 1 and sum(line.startswith("refused run.name: ") for line in said) == 3, said


def forge(folder: Path, age: float = 0.0, **values: object) -> Path:
    """An owner's file as another process would have left it, last touched `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    RunOwner(folder, print)
    (file,) = (folder / ".owner").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.mark.parametrize("values", [
    {"pid": 2**22 + 5}, {"started": psutil.Process().create_time() - 100},  # gone, or its number given to another since
], ids=["no such process", "another process"])  # fmt: skip
def test_a_process_that_is_gone_holds_nothing(values, tmp_path):
    forge(tmp_path, **values)
    RunOwner(tmp_path, print).check()


def test_another_machine_is_dead_after_a_minute_without_a_touch(tmp_path, monkeypatch):
    forge(tmp_path / "old", age=61, host="elsewhere", boot="x")
    RunOwner(tmp_path / "old", print).check()
    monkeypatch.setattr(run_owner, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(run_owner, "BEAT_SECONDS", 0.5)
    said: list[str] = []
    forge(tmp_path, host="elsewhere", boot="x", job="17")
    started = time.monotonic()
    RunOwner(tmp_path, said.append)  # perhaps it lives: that takes time to tell
    assert 1.5 < time.monotonic() - started < 8
    assert len(said) == 1 and "Slurm job 17" in said[0] and "elsewhere" in said[0]


@contextmanager
def touched(file: Path) -> Iterator[None]:
    """Its owner lives: somebody touches the file again and again."""
    toucher = subprocess.Popen(["/bin/sh", "-c", f"while sleep 0.3; do touch '{file}'; done"])
    try:
        yield
    finally:
        toucher.kill()
        toucher.wait()


def test_another_machine_that_touches_its_file_has_the_folder(tmp_path):
    file = forge(tmp_path, host="elsewhere", boot="x")
    with touched(file), pytest.raises(UserError, match="on elsewhere"):
        RunOwner(tmp_path, print)


def test_a_job_that_slurm_has_requeued_takes_over_at_once(tmp_path, monkeypatch):
    forge(tmp_path, host="elsewhere", boot="x", job="17", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    started = time.monotonic()
    RunOwner(tmp_path, print)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("released", [False, True])
def test_an_earlier_life_of_a_requeued_job_takes_nothing_over(released, tmp_path, monkeypatch):
    """It was starting on a node of which Slurm lost sight, and comes to claim the folder after the later one has; also where
    that one has only begun, and its training is still to claim it."""
    monkeypatch.setattr(run_owner, "STALE_SECONDS", 2.0)
    file = forge(tmp_path, host="elsewhere", boot="x", job="17", restart="10", **({"released": True} if released else {}))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "9")
    with touched(file), pytest.raises(UserError, match="on elsewhere, Slurm job 17"):
        RunOwner(tmp_path, print)


def test_the_one_taken_for_dead_is_fenced_and_frees_nothing(tmp_path):
    first = RunOwner(tmp_path, print)
    first.beat()
    (file,) = (tmp_path / ".owner").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "host": "elsewhere", "boot": "x"}))
    os.utime(file, (0, 0))
    second = RunOwner(tmp_path, print)
    for act in (first.check, first.beat):
        with pytest.raises(Fenced, match=rf"taken over by process {os.getpid()}"):
            act()
    first.release()
    second.check()
    with pytest.raises(UserError, match="belongs to a run that goes on"):
        RunOwner(tmp_path, print)
    second.release()
    second.release()
    RunOwner(tmp_path, print)


@pytest.mark.parametrize("copy", [shutil.copytree, lambda a, b: subprocess.run(["cp", "-a", a, b], check=True)],
                         ids=["copytree", "cp -a"])  # fmt: skip
def test_a_copy_of_a_folder_is_not_the_folder(copy: Callable, tmp_path):
    (tmp_path / "run").mkdir()
    first = RunOwner(tmp_path / "run", print)
    copy(tmp_path / "run", tmp_path / "copy")
    started = time.monotonic()
    RunOwner(tmp_path / "copy", print).check()
    assert time.monotonic() - started < 2
    first.check()


def test_a_folder_that_cannot_be_seen_fences_nobody(tmp_path):
    owner = RunOwner(tmp_path, print)
    (tmp_path / ".owner").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        owner.beat()
    (tmp_path / "away").rename(tmp_path / ".owner")
    owner.beat()


def test_a_torn_file_holds_nothing(tmp_path):
    forge(tmp_path).write_text('{"token": "12')
    RunOwner(tmp_path, print).check()


def test_a_run_that_was_taken_over_says_nothing_about_the_other(tmp_path: Path) -> None:
    """Its processes would take a failure in ended.json for one of their own, and end."""
    first = RunOwner(tmp_path, print)
    first.release()
    second = RunOwner(tmp_path, print)
    late, living = Ending(tmp_path, 1), Ending(tmp_path, 0)
    late.claim_number, living.claim_number = first.number, second.number
    late.failed(UserError("another process of the run is gone"))
    assert late.is_ours() and living.said() is None and not (tmp_path / "ended.json").exists()
    assert living.claim("complete", 0)
    assert living.said()["how"] == "complete" and late.said() is None
