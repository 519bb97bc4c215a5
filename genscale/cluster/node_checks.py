"""What a node is and allows: versions, cores, limits, shared memory, and what killed builds have left behind. No torch is
loaded, so that it costs a job a second."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import genscale
from genscale.cluster.checks import Check, count_of, host_name
from genscale.writing import write_draft

PACKAGES = ("torch", "accelerate", "deepspeed", "datasets", "wandb")
SMALLEST_SHARED_MEMORY = 2**30
"""NCCL keeps tens of MiB of it for each pair of GPUs, and loader workers hand batches over in it; Docker gives 64 MiB."""
BUILD_SECONDS = 1800.0
"""A build that another node may be making is taken for dead after so long."""


@dataclass(frozen=True)
class Load:
    """What a run puts on a node.

    Attributes:
        world_size: processes in all.
        processes: of them, on this node.
        workers: loader workers of each process.
    """

    world_size: int = 1
    processes: int = 1
    workers: int = 0

    @classmethod
    def of_environment(cls, workers: int = 0) -> Load:
        """As the launcher or Slurm says; one process where nobody says anything."""
        world = _number("WORLD_SIZE") or _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1
        nodes = _number("SLURM_STEP_NUM_NODES") or _number("SLURM_JOB_NUM_NODES") or 1
        # With one task a node, its launcher starts a process for each GPU.
        here = _number("LOCAL_WORLD_SIZE") or max(_number("SLURM_GPUS_ON_NODE"), world // nodes, 1)
        return cls(max(world, here * nodes), here, workers)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def check_versions() -> Iterator[Check]:
    """The versions of genscale, Python and the packages that compute; all nodes must have the same."""
    found, missing = [f"genscale {genscale.__version__}", f"Python {'.'.join(map(str, sys.version_info[:3]))}"], []
    for package in PACKAGES:
        number = None  # also of a package that is there in part
        with contextlib.suppress(PackageNotFoundError):
            number = version(package)
        if number:
            found.append(f"{package} {number}")
        else:
            missing.append(package)
    if missing:
        yield Check("versions", "failure", f"{', '.join(found)}; not installed: {', '.join(missing)}",
                    "activate the environment that genscale was installed into (site.yaml: environment), on every node",
                    host_name(), of_node=True)
    else:
        yield Check("versions", "ok", ", ".join(found), host=host_name())


def check_cores(load: Load) -> Iterator[Check]:
    """CPU cores that this process may use, against processes, their loader workers and threads."""
    cores = max(len(os.sched_getaffinity(0)), _number("SLURM_CPUS_ON_NODE"))  # a task is bound to its own share
    wanted, threads = load.processes * (1 + load.workers), _number("OMP_NUM_THREADS")
    what = f"{count_of(cores, 'core')} for {count_of(load.processes, 'process')}"
    if load.workers:
        what += f" and {count_of(load.processes * load.workers, 'loader worker')}"
    remedy = ""
    if wanted > cores:
        fitting = f"set data.workers to {max(0, cores // load.processes - 1)}" if load.workers else \
            f"start at most {count_of(cores, 'process')} on this node"
        remedy = f"{fitting}, or ask for {wanted:,} cores (--cpus-per-task)"
    elif threads * load.processes > cores:
        what += f" of OMP_NUM_THREADS={threads}"
        remedy = f"set OMP_NUM_THREADS to {max(1, cores // load.processes)}"
    yield Check("CPU cores", "warning" if remedy else "ok", what, remedy, host_name())


def check_limits(load: Load) -> Iterator[Check]:
    """Open files and locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A token cache maps up to 400 files, a process and a worker hold a few dozen, and each peer takes sockets.
    needed = 512 + 32 * load.workers + 8 * load.world_size
    files = f"{_amount(soft)} may be open in a process, about {needed:,} are needed"
    if soft != resource.RLIM_INFINITY and soft < needed:
        higher = hard == resource.RLIM_INFINITY or hard >= needed
        yield Check("open files", "warning" if soft >= needed // 4 else "failure", files,
                    f"`ulimit -n {needed if hard == resource.RLIM_INFINITY else min(hard, max(needed, 65536))}` before the run"
                    if higher else f"have the hard limit ({hard:,}) raised by the administrator", host_name(), of_node=True)
    else:
        yield Check("open files", "ok", files, host=host_name())
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fabric = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if fabric and locked != resource.RLIM_INFINITY:
        yield Check("locked memory", "warning", f"{locked // 1024:,} KiB, and NCCL registers its buffers with "
                    f"{', '.join(fabric)}", "have the limit lifted: `ulimit -l unlimited`, for Slurm's jobs "
                    "LimitMEMLOCK=infinity of slurmd; or NCCL_IB_DISABLE=1, which is slower", host_name(), of_node=True)
    else:
        shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024:,} KiB"
        yield Check("locked memory", "ok", shown + ("" if fabric else "; no InfiniBand here that would need more"),
                    host=host_name())


def check_shared_memory(load: Load, folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    """What processes of one node hand each other."""
    try:
        usage = shutil.disk_usage(folder)
        write_draft(folder / "genscale-doctor", b"0" * 4096).unlink()
    except OSError as error:
        yield Check("shared memory", "failure", f"{folder} cannot be used ({error.strerror})", "mount a tmpfs there, at least "
                    "1 GiB", host_name(), of_node=True)
        return
    found = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB of {folder} are free"
    if usage.free >= SMALLEST_SHARED_MEMORY or (load.processes == 1 and not load.workers):
        yield Check("shared memory", "ok", found, host=host_name())
    elif usage.total >= SMALLEST_SHARED_MEMORY:
        yield Check("shared memory", "warning", found, f"remove what ended jobs have left in {folder}, or set data.workers "
                    "to 0", host_name(), of_node=True)
    else:
        yield Check("shared memory", "warning", found, "give the container more (docker run --shm-size 8g, or --ipc host; "
                    "apptainer has the node's), or set data.workers to 0", host_name())


def check_extension_builds() -> Iterator[Check]:
    """Locks of builds of PyTorch and DeepSpeed extensions that were killed: every later build waits at one for ever."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])  # <root>[/<Python and CUDA>]/<extension>/lock
    held = _open_files() if locks else set()  # who builds keeps the lock open
    left = [lock for lock in locks if str(lock.resolve()) not in held]
    if left:
        # A home directory is often shared: young ones may be another node's.
        old = all(_age(lock) > BUILD_SECONDS for lock in left)
        yield Check("extension builds", "warning", f"no process of this node holds the {count_of(len(left), 'build lock')} in "
                    f"{root}: what DeepSpeed builds there hangs",
                    f"{'' if old else 'if no other node is building: '}rm {' '.join(map(str, left))}", host_name())
    else:
        building = f"; {count_of(len(locks), 'build')} under way" if locks else ""
        yield Check("extension builds", "ok", f"no lock of a killed build in {root}{building}", host=host_name())


def _open_files() -> set[str]:
    found = set()
    for process in psutil.process_iter():
        try:
            found |= {file.path for file in process.open_files()}
        except (psutil.Error, OSError):  # another user's, or gone meanwhile
            continue
    return found


def _age(path: Path) -> float:
    """Seconds; 0 where it has just been removed."""
    try:
        return max(1e-3, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def _amount(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"
