"""Whether a node has the GPUs that Slurm has given the job on it: else a run would compute on the CPU, to its end.

Looked at twice: before a life of a job, without torch, where the driver can be asked; and by each training process, with torch.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from genscale.cluster.checks import Check, count_of, host_name
from genscale.cluster.fitness import report_fault
from genscale.cluster.lives import this_job
from genscale.errors import UnfitNode
from genscale.supervise.ending import RUN

DRIVER_SECONDS = 15
"""A driver with a GPU in trouble may not answer at all."""
ON_PURPOSE = "to train on the CPU, ask for no GPUs (--gpus-per-node 0), or say so (ACCELERATE_USE_CPU=true)"
# In a process of its own: a driver may hang, and what it sets up is not for this one.
ASK_DRIVER = """
import ctypes
driver, count, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_char_p()
code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
if code:
    driver.cuGetErrorName(code, ctypes.byref(name))
print(count.value, (name.value or b"error %d" % code).decode() if code else "")
"""


def promised_gpus() -> int:
    """Those that Slurm gave the job on this node; 0 where it computes on the CPU by its own wish."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return int(given) if given.isdigit() and not on_cpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else 0


def check_promised() -> Iterator[Check]:
    """Whether torch, which is not loaded, would find the GPUs that Slurm gave. Judges NVIDIA's alone: of others it is
    the training that says so."""
    promised = promised_gpus()
    if not promised:
        return
    build = _torch_build()
    if build and not any(build.get(kind) for kind in ("cuda", "hip", "xpu")):
        yield Check("promised GPUs", "failure", f"Slurm gave {count_of(promised, 'GPU')}, and torch {build['__version__']} is "
                    "built for the CPU", f"install the build for the node's GPUs; {ON_PURPOSE}", host_name())
    elif build.get("cuda") and (fault := _fault_of_driver(promised)):
        yield Check("promised GPUs", "failure", f"Slurm gave {count_of(promised, 'GPU')}, and {fault}",
                    f"have the node drained, and leave it out (--exclude); {ON_PURPOSE}", host_name(), of_node=True)


def check_devices() -> None:
    """Refuse to train on the CPU, or two processes on a GPU, where Slurm gave this process one. Raises UnfitNode, after it has
    reported the node to the job."""
    promised = promised_gpus()
    if not promised:
        return
    import torch

    build, count = torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if rank < count:
        return
    if not (torch.version.cuda or torch.version.hip):
        fault, of_node = f"torch {build} is built for other devices than CUDA's and ROCm's", False
    else:
        fault, of_node = f"torch {build} sees {count_of(count, 'GPU') if count else 'none'}", True
    found = f"promised GPUs: Slurm gave {count_of(promised, 'GPU')}, and {fault}"
    if RUN in os.environ and "SLURM_JOB_ID" in os.environ:
        report_fault(Path(os.environ[RUN]), *this_job(), found, of_node)
    error = UnfitNode(f"{host_name()} is not fit: {found}; {ON_PURPOSE}")
    error.alone = rank == count or rank == 0  # one of each node
    raise error


def _torch_build() -> dict[str, Any]:
    """What the torch that Python would load is built for, as its version.py has it; empty where there is none."""
    found = PathFinder.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    return runpy.run_path(str(file)) if file and file.is_file() else {}


def _fault_of_driver(promised: int) -> str | None:
    try:
        asked = subprocess.run([sys.executable, "-I", "-S", "-c", ASK_DRIVER], capture_output=True, text=True,
                               timeout=DRIVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the NVIDIA driver did not answer within {DRIVER_SECONDS} s"
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["it crashed"])[-1]
        return f"there is no NVIDIA driver here ({reason.removeprefix('OSError: ')[:200]})"
    count, _, error = asked.stdout.strip().partition(" ")
    if error:
        return f"the NVIDIA driver does not start ({error})"
    # Of the parts that a GPU is divided into (MIG) a process is shown one.
    needed = 1 if "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", "") else promised
    return f"the NVIDIA driver shows {count}" if int(count) < needed else None
