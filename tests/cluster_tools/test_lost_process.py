"""Who has started a process of a job that was killed says so to the others, and never about another life of the job."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import psutil
import pytest

from genscale.supervise.run_owner import RunOwner


@pytest.fixture
def killed(genscale, run, in_job, monkeypatch):
    """A process of the job ended with this code: what `ended.json` says then, if anything."""

    def end(code=137, restart=0, rank="1"):
        in_job("7", restart)
        if rank is None:
            monkeypatch.delenv("RANK", raising=False)
        else:
            monkeypatch.setenv("RANK", rank)
        assert genscale("slurm", "lost", run, "--code", code).code == 0
        file = run / "ended.json"
        return json.loads(file.read_text()) if file.exists() else None

    return end


@pytest.fixture
def owned(run, in_job):
    """By the life after one restart."""
    in_job("7", 1)
    (run / "jobs").mkdir(parents=True)
    owner = RunOwner(run, print)
    yield owner
    owner.release()


def test_the_others_are_told_who_is_gone(killed, owned, run):
    said = killed(restart=1)
    assert (said["how"], said["exit_code"], said["rank"]) == ("lost", 137, 1)
    assert said["reason"] == "rank 1 on node0 was lost (SIGKILL: out of memory?)"
    assert "rank 1 on node0 was lost" in (run / "jobs" / "events.log").read_text()
    assert killed(139, restart=1, rank="0") == said  # the first word counts


def test_whoever_stops_with_the_others_is_not_lost(killed, owned):
    assert [killed(code, restart=1) for code in (0, 129, 130, 138, 143)] == 5 * [None]


def test_no_word_is_said_about_another_life(killed, owned, run):
    assert killed(restart=0) is None  # of a node that Slurm had lost sight of: the later life trains
    assert killed(restart=2) is None  # which only starts, and has not got the folder
    owned.release()
    assert killed(restart=1) is None  # it had come to its end


def test_processes_that_outlive_their_launcher_are_waited_for(killed, owned, run):
    """They were told to stop, and write a checkpoint."""
    with subprocess.Popen(["sleep", "1"]) as worker:
        beat = {"host": socket.gethostname(), "pid": worker.pid, "started": psutil.Process(worker.pid).create_time()}
        (run / "logs").mkdir(exist_ok=True)
        (run / "logs" / "heartbeat-00000.json").write_text(json.dumps(beat))
        said = killed(restart=1, rank=None)
        assert not os.path.exists(f"/proc/{worker.pid}") or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE
    assert said["reason"] == "the launcher on node0 was lost (SIGKILL: out of memory?)"
