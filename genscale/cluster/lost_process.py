"""A process of a job that was killed says nothing, and the others may wait for it for long: in a collective of NCCL, or outside
of any. What has started it says it instead, and they leave.

Loads no torch: it runs where memory may just have run out.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from genscale import exit_codes
from genscale.checkpoint.names import latest_step
from genscale.cluster.checks import host_name
from genscale.cluster.lives import read_ended, read_record, tell, this_job
from genscale.cluster.why_ended import why_ended
from genscale.supervise.ending import Ending
from genscale.supervise.run_owner import latest_claim
from genscale.supervise.signals import SIGNALS

OF_ITS_OWN = {exit_codes.DONE, *map(exit_codes.of_signal, SIGNALS)}
"""Exit codes of a process that stops with the others: rank 0 has the word then."""


def tell_the_others(run: Path, code: int) -> int:
    """Say in `ended.json` that a process of this life is lost, where nobody has said yet how the life ended.

    Where it was a launcher that was killed (RANK is not set), its processes have been told to stop, and may be writing a
    checkpoint: they are waited for, since what is left of a task that has ended is killed.

    Returns: 0.
    """
    job, _ = this_job()
    rank = os.environ.get("RANK")
    if rank is None and code > 128:
        while any(_is_ours_and_lives(process) for process in _processes(run)):
            time.sleep(0.2)
    if code in OF_ITS_OWN or read_ended(run) or not _has_the_folder(run):
        return exit_codes.DONE
    who = f"rank {rank}" if rank else "the launcher" if code > 128 else "a process"
    # A launcher has printed what became of its process, and ends with a code of its own.
    why = _in_words(code) if rank or code > 128 else why_ended(run, job, code, None)
    reason = f"{who} on {host_name()} was lost ({why})"
    ending = Ending(run, int(rank or 0))
    ending.step = latest_step(run)
    if ending.claim("lost", code, reason=reason):
        tell(run, job, reason)
    return exit_codes.DONE


def _processes(run: Path) -> Iterator[dict]:
    yield from filter(None, map(read_record, (run / "logs").glob("heartbeat-*.json")))


def _is_ours_and_lives(beat: dict) -> bool:
    try:
        process = psutil.Process(int(beat["pid"]))
        return (beat["host"] == socket.gethostname() and process.create_time() == beat["started"]
                and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _has_the_folder(run: Path) -> bool:
    """Whether this life has it: not one before, as long as this one starts, nor a later one, to which this node is lost."""
    owner = read_record(run / ".owner" / f"{latest_claim(run):08d}.json") or {}
    mine = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    return (owner.get("job"), owner.get("restart")) == mine and not owner.get("released")


def _in_words(code: int) -> str:
    if code == exit_codes.of_signal(signal.SIGKILL):
        return "SIGKILL: out of memory?"
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
