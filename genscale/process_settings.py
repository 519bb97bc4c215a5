"""What importing genscale sets in a process, before torch is loaded: how idle threads wait, what malloc keeps, and how a GPU's
allocator grows."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass

WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SPINS = "500"
"""Looks that a thread of libgomp takes for its next piece of work before it sleeps (some 10 microseconds): so few that
they cost little on a machine that does other things as well. Its own 300,000 make a step there five times slower."""
SPINS_WHEN_QUIET = "20000"
"""Enough for what lies between two operations of a step: to wake a thread that sleeps takes longer than most of them."""
WINDOW_SECONDS = 0.1
"""At least so long is looked at the machine: a kernel counts in hundredths of a second."""
SLACK = 0.25
"""Cores' worth of what others do that a quiet machine may show: a desktop, a shell, the tick of a clock."""
LARGE = 2**27
"""Bytes of an allocation that goes back to the kernel when it is freed. All others are kept for the next."""


@dataclass(frozen=True)
class Look:
    """At what the cores that this process may use have done so far, in seconds: all of it, and this process's part."""

    at: float
    busy: float
    own: float
    cores: int


_first_look: Look | None = None


def wait_shortly() -> None:
    """Idle threads of torch's OpenMP soon sleep, unless the user has said how they wait. It is read when torch is loaded."""
    global _first_look
    if not set(WAITING) & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=SPINS)
        _first_look = look()


def wait_longer_if_quiet() -> None:
    """Let them look for work for longer where nothing else has used the cores since genscale was imported.

    To be called before torch is loaded, by who is to train. Processes that it starts inherit the choice."""
    if _first_look is None or "torch" in sys.modules or os.environ.get("GOMP_SPINCOUNT") != SPINS:
        return
    time.sleep(max(0.0, _first_look.at + WINDOW_SECONDS - time.monotonic()))
    now = look()
    if now is not None and is_quiet(_first_look, now, _threads(now.cores)):
        os.environ["GOMP_SPINCOUNT"] = SPINS_WHEN_QUIET


def is_quiet(before: Look, now: Look, threads: int) -> bool:
    """Whether so many threads would have had a core each."""
    seconds = max(now.at - before.at, 1e-9)
    others = (now.busy - before.busy - (now.own - before.own)) / seconds
    return others <= now.cores - threads + SLACK


def look() -> Look | None:
    """None where the system does not tell (it does on Linux)."""
    try:
        mine = os.sched_getaffinity(0)
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu") and line[3:4].isdigit()]
    except (AttributeError, OSError):
        return None
    busy = sum(sum(map(int, row[1:9])) - int(row[4]) - int(row[5]) for row in rows if int(row[0][3:]) in mine)  # idle, iowait
    return Look(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time(), len(mine))


def _threads(cores: int) -> int:
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else cores


ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


def let_segments_grow() -> None:
    """Have torch's allocator on a GPU lengthen its segments, unless the user has said what it is to do: micro-batches and
    phases of many sizes otherwise leave gaps that nothing fits into, and a run is out of memory that has enough of it."""
    if not set(ALLOCATOR) & os.environ.keys():
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def keep_memory() -> None:
    """Let glibc's malloc keep what a step frees, unless the user has said what it is to do: the kernel would clear every page
    of it for the next step, a tenth of the time of a small model's. Other C libraries are left as they are."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    process = ctypes.CDLL(None) if os.name == "posix" else None
    if process is not None and hasattr(process, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        process.mallopt(mmap_threshold, LARGE) or process.mallopt(mmap_threshold, 2**25)  # the most that glibc 2.34 takes
        process.mallopt(trim_threshold, -1)  # never
