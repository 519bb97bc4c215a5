"""Why a life has ended of which the run itself has said nothing: before its first step, in its launcher, or killed.

What is left then is what the job has printed, what Slurm says, and an exit code.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from datetime import datetime
from pathlib import Path

from genscale.cluster import slurm_commands
from genscale.cluster.job_records import submitted
from genscale.cluster.lives import one_line
from genscale.errors import UserError
from genscale.reading import open_plain

TAIL_BYTES = 2**18
"""Last bytes of a log, in which the reason is looked for."""
_SLURM = re.compile(r"CANCELLED AT \S+ DUE TO (?P<why>(?!JOB REQUEUE)[A-Z ]+)|(?P<node>Node failure on \S+)", re.MULTILINE)
_MEMORY = re.compile(r"^.*(?:out[ -]of[ -]memory|oom[-_]kill).*$", re.MULTILINE | re.IGNORECASE)
_PORT = re.compile(r"^.*(?:EADDRINUSE|address already in use|another process is utilizing it).*$", re.MULTILINE | re.IGNORECASE)
_FIRST = re.compile("|".join((
    r"^error: .*",  # ours
    r"^FATAL: .*",  # of apptainer
    r"^slurmstepd: error: (?:pyxis|execve|couldn't).*",
    r"^.*: (?:command not found|No module named .*|(?:can't open file|cannot execute).*)$",
    r"^(?!srun:|slurmstepd:|scontrol:)[\w<>./ -]+: error: .*",  # of a program that refuses its arguments
    r"^(?:\[rank\d+\]: )?(?:\w+\.)*\w+(?:Error|Exception)(?:: .*)?$",  # the last line of a traceback
    r"^Fatal Python error: .*",
    r"^srun: error: .*(?:Killed|Segmentation fault|Aborted|Bus error|Illegal instruction|Unable to|Exited with).*",
    r"Signal \d+ \(SIG\w+\) received by PID \d+",  # of torchrun
)), re.MULTILINE)  # fmt: skip
_CONSEQUENCE = re.compile(r"ChildFailedError|SignalException|Connection (?:reset|closed|refused)|Broken pipe|BrokenPipeError|"
                          r"Dist(?:Network|Store|Backend)Error|RendezvousConnectionError|CalledProcessError|Exited with")
"""What is said of an error that another process has met."""


_DISK = re.compile(r"No space left on device|Disk quota exceeded|Input/output error|Stale file handle|Read-only file system")


def of_the_disk(reason: str | None) -> bool:
    """Whether that is a reason which a later life may not meet: a full disk, or a file server in trouble."""
    return reason is not None and _DISK.search(reason) is not None


def why_ended(run: Path, job: str, code: int | None, since: str | None) -> str | None:
    """The reason in a line; None where there is no trace of any.

    Args:
        code: the exit code of what has run, as srun gave it.
        since: when the life began, in ISO format.
    """
    log = log_of(run, job)
    for file in [*([log] if log else []), *_rank_logs(run, since)]:
        if reason := reason_in(_of_this_life(_tail(file), job)):
            return reason
    return _of_code(code) if code else None


def why_cut_off(run: Path, job: str, restart: int) -> str | None:
    """The same of a life that nobody could tell the end of: what the log or Slurm's accounting has of it."""
    log = log_of(run, job)
    reason = reason_in(_of_this_life(_tail(log), job)) if log else None
    if reason is None:
        with contextlib.suppress(UserError):
            states = slurm_commands.states_of_lives(job)
            reason = states[restart].lower().replace("_", " ") if restart < len(states) else None
    return reason or "nobody has told its end: its node died, or Slurm has requeued it"


def log_of(run: Path, job: str) -> Path | None:
    """What the job prints to, as its submission has noted it, or Slurm."""
    own = next((entry.log for entry in reversed(submitted(run)) if entry.job == job and entry.log), None)
    if own is None:
        with contextlib.suppress(UserError):
            own = slurm_commands.printed_to(job)
    return Path(own) if own else None


def reason_in(text: str) -> str | None:
    """What a log says of the end: Slurm's reason, a lack of memory, a port that was taken, or else the first error that is not
    the consequence of another. None where it says nothing."""
    if found := list(_SLURM.finditer(text)):
        return one_line(f"Slurm: {(found[-1]['why'] or found[-1]['node']).strip().lower()}")
    for label, pattern in (("out of memory", _MEMORY), ("a port is taken", _PORT)):
        if match := pattern.search(text):
            return one_line(f"{label}: {match[0]}")
    lines = [match[0] for match in _FIRST.finditer(text)]
    # srun may be ahead of what a task has printed, and says of its exit code only that there is one.
    return one_line(min(lines, key=lambda line: (bool(_CONSEQUENCE.search(line)), "Exited with" in line))) if lines else None


def _of_code(code: int) -> str:
    if code == 127:
        return "exit code 127: a program of the script is not there"
    with contextlib.suppress(ValueError):
        name = signal.Signals(code - 128).name
        return f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"exit code {code}"


def _tail(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError), open_plain(file) as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - TAIL_BYTES))
        return opened.read(TAIL_BYTES).decode(errors="replace").replace("\r", "\n")
    return ""


def _of_this_life(text: str, job: str) -> str:
    """What comes after the line by which the latest life began, or by which the one before it ended."""
    return re.split(rf"^genscale: job {re.escape(job)}: life \d+ (?:begins|ended) .*$", text, flags=re.MULTILINE)[-1]


def _rank_logs(run: Path, since: str | None) -> list[Path]:
    """Those of the processes that have been written to in this life."""
    with contextlib.suppress(OSError, ValueError):
        began = datetime.fromisoformat(since or "").timestamp()
        return sorted(path for path in (run / "logs").glob("rank-*.log") if path.stat().st_mtime >= began)
    return []
