"""genscale trains generative models at any scale: a run is the same run however it is sharded, interrupted or resized."""

import ctypes
import os

__version__ = "0.2.0"

SPINS = "500"
"""Looks that a thread of libgomp takes for its next piece of work before it sleeps (some 10 microseconds): enough for what lies
between most operations, where waking a sleeping thread takes longer, and so few that they cost little on a machine that does
other things as well. Its own 300,000 make a step there five times slower."""
LARGE = 2**27
"""Bytes of an allocation that goes back to the kernel when it is freed. All others are kept for the next."""


def _wait_shortly() -> None:
    """How idle threads of torch's OpenMP wait, unless the user has said it. Read when torch is loaded."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=SPINS)


def _keep_memory() -> None:
    """Let glibc's malloc keep what a step frees, unless the user has said what it is to do: the kernel would clear every page
    of it for the next step, a tenth of the time of a small model's. Other C libraries are left as they are."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    process = ctypes.CDLL(None) if os.name == "posix" else None
    if process is not None and hasattr(process, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        process.mallopt(mmap_threshold, LARGE) or process.mallopt(mmap_threshold, 2**25)  # the most that glibc 2.34 takes
        process.mallopt(trim_threshold, -1)  # never


# Here, which runs before anything else of genscale, and before torch.
_wait_shortly()
_keep_memory()
