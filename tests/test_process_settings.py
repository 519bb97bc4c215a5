"""What importing genscale sets in a process: how threads wait, what malloc keeps, how a GPU's allocator grows. Real processes,
real libraries."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genscale.process_settings import SPINS, Look, is_quiet, look

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
             if not name.startswith(("OMP_", "GOMP_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "PYTORCH_"))}
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


LOOKING = """
import genscale, os, time
from genscale.process_settings import wait_longer_if_quiet
time.sleep(0.5)
wait_longer_if_quiet()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.skipif(look() is None, reason="this system does not tell what its cores do")
def test_beside_busy_loops_threads_do_not_spin_longer():
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        spins = python(LOOKING).stdout.strip()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert spins == SPINS


def test_what_the_user_has_said_of_waiting_stays():
    assert python(LOOKING, GOMP_SPINCOUNT="7").stdout.strip() == "7"


@pytest.mark.parametrize(("others", "cores", "threads", "quiet"), [
    (0.0, 2, 2, True), (0.2, 2, 2, True), (1.0, 2, 2, False), (1.0, 2, 1, True), (3.0, 8, 4, True), (5.0, 8, 4, False),
])  # fmt: skip
def test_a_machine_is_quiet_where_each_thread_has_a_core(others, cores, threads, quiet):
    before, now = Look(at=5.0, busy=100.0, own=1.0, cores=cores), Look(5.5, 100.0 + 0.5 * others + 0.4, 1.4, cores)
    assert is_quiet(before, now, threads) == quiet


@pytest.mark.skipif(look() is None, reason="this system does not tell what its cores do")
def test_a_look_counts_the_work_of_this_process():
    before = look()
    while time.process_time() < before.own + 0.3:
        pass
    now = look()
    assert now.own - before.own >= 0.3 and now.busy - before.busy >= 0.25


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize(("variables", "kept"), [
    ({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, False),
], ids=["ours", "variable", "tunable"])  # fmt: skip
def test_malloc_keeps_what_is_freed_unless_the_user_says_otherwise(variables, kept):
    faults = int(python(FREEING, **variables).stdout)
    assert (faults < 100) == kept, faults


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "None")])
def test_a_gpu_s_allocator_grows_its_segments_unless_the_user_says_otherwise(variables, expected):
    done = python("import genscale, os, torch; print(os.environ.get('PYTORCH_ALLOC_CONF'))", **variables)
    assert (done.stdout.strip(), done.stderr) == (expected, "")
