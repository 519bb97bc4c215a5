"""The disk of a run folder: whether it takes what a run writes, how fast, and whether every node sees the same one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from genscale.cluster.checks import Check, host_name
from genscale.writing import write_seconds

SPEED_BYTES = 64 * 2**20
QUICK_BYTES = 8 * 2**20
SLOW = 50 * 2**20
"""Bytes a second below which a checkpoint of a billion parameters takes minutes."""
LITTLE = 10 * 2**30
"""Free space below which a disk is likely to fill during a run."""
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs"}
"""File systems that are one node's own (unless it is exported to the others)."""


def check_run_folder(folder: Path, size: int = SPEED_BYTES, nodes: int = 1) -> Iterator[Check]:
    """Space, speed and kind of the disk that `folder` lies on, or will lie on.

    Args:
        size: bytes written to measure the speed.
        nodes: that the run will use.
    """
    there = existing(folder)
    try:
        seconds = write_seconds(there, size, "doctor")
        usage = shutil.disk_usage(there)
    except OSError as error:
        yield Check("run folder", "failure", f"{there} cannot be written ({error.strerror})", "set run.dir to a folder that "
                    "can be, or free some space", host_name())
        return
    kind, needed = file_system(there), _checkpoint_bytes(folder)
    space = f"{_gib(usage.free)} free on {there} ({kind})"
    if usage.free < max(needed, 64 * 2**20):
        yield Check("disk space", "failure", f"{space}, a checkpoint takes {_gib(needed)}" if needed else space,
                    "free some space, lower train.checkpoint_keep, or set run.dir to another disk", host_name())
    elif usage.free < max(LITTLE, 3 * needed):
        yield Check("disk space", "warning", space, "free some space, or lower train.checkpoint_keep", host_name())
    else:
        yield Check("disk space", "ok", space, host=host_name())
    rate = size / seconds
    speed = f"{rate / 2**20:,.0f} MiB/s, written and synced"
    if rate < SLOW:
        yield Check("disk speed", "warning", speed, "checkpoints will be slow: set run.dir to a faster file system",
                    host_name())
    else:
        yield Check("disk speed", "ok", speed, host=host_name())
    if nodes > 1 and kind in LOCAL:
        yield Check("shared folder", "warning", f"{there} is on {kind}, which is most often one node's own", "set run.dir to "
                    "the file system that all nodes share", host_name())


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def file_system(folder: Path) -> str:
    """Its type as the kernel has it: ext4, nfs4, lustre, ..."""
    found, longest, path = "unknown", -1, str(folder.resolve())
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mounted, kind, *_ = line.split()
            mounted = mounted.replace("\\040", " ")
            if len(mounted) >= longest and f"{path}/".startswith(f"{mounted.rstrip('/')}/"):
                found, longest = kind, len(mounted)
    return found


def _checkpoint_bytes(folder: Path) -> int:
    """What the run's latest checkpoint takes; 0 where there is none yet."""
    steps = sorted((folder / "checkpoints").glob("step-*"))
    return sum(file.stat().st_size for file in steps[-1].rglob("*") if file.is_file()) if steps else 0


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
