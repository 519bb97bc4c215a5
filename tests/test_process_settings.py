"""What importing genscale sets in a process: how threads wait, and what malloc keeps. Real processes, real libraries."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = next((Path(importlib.util.find_spec("torch").origin).parent / "lib").glob("libgomp*"), None)
WAITING = f"import sys, genscale, ctypes; assert 'torch' not in sys.modules; ctypes.CDLL({str(LIBRARY)!r})"
FREEING = """
import genscale, ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(48 * 2**20)
    libc.memset(block, 1, 48 * 2**20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(("OMP_", "GOMP_", "MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    return subprocess.run([sys.executable, "-c", code], env={**clean, "PYTHONPATH": str(ROOT), **variables}, text=True,
                          capture_output=True, check=True)


@pytest.mark.skipif(LIBRARY is None, reason="torch's OpenMP is another here")
@pytest.mark.parametrize(("variables", "spins"), [
    ({}, "500"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
], ids=["ours", "passive", "active", "theirs"])  # fmt: skip
def test_threads_spin_shortly_unless_the_user_says_otherwise(variables, spins):
    shown = python(WAITING, OMP_DISPLAY_ENV="verbose", **variables).stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize(("variables", "kept"), [
    ({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
], ids=["ours", "variable", "tunable"])  # fmt: skip
def test_malloc_keeps_what_is_freed_unless_the_user_says_otherwise(variables, kept):
    faults = int(python(FREEING, **variables).stdout)
    assert (faults < 100) == kept, faults
