"""What every result of a benchmark says of itself: machine, versions, commit, command, and what else the machine did.

It is what benchmarks load first, and loads genscale before torch, as the command line does: torch heeds some of what genscale
sets only while it is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import genscale  # noqa: F401

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system, and the GPU where there is one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0)),
             "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "system": platform.platform()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return found


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit, command and date."""
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "command": " ".join(["python", *sys.argv]), "commit": commit(),
            "machine": machine(), "load_before": load(), "python": platform.python_version(),
            "versions": {name: _version(name) for name in packages}}


def load() -> dict[str, float]:
    """How many processes wanted a core in the last minute, and how many cores are busy now, while we do nothing."""
    busy = foreign_cores()
    time.sleep(0.5)
    return {"average_of_last_minute": round(os.getloadavg()[0], 2), "busy_cores": busy()}


def foreign_cores(ours: Iterable[psutil.Process] = ()) -> Callable[[], float]:
    """Begins to watch the machine; a call tells how many cores were busy since then with anything but these processes."""
    watched = [psutil.Process(), *ours]

    def look() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Linux counts a guest's time as the user's as well.
        everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return time.monotonic(), everything - idle, sum(sum(process.cpu_times()[:2]) for process in watched)

    began = look()

    def cores() -> float:
        seconds, busy, own = (now - then for now, then in zip(look(), began, strict=True))
        return max(0.0, round((busy - own) / seconds, 2))

    return cores


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(checkout: Path = ROOT) -> str | None:
    """A checkout's commit, marked where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or None


def write(result: dict[str, Any], out: Path | None) -> None:
    """Print the result, and keep it as JSON."""
    result = {**result, "load_after": load()}
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
