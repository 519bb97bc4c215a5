"""How long something takes on this machine: what the doctor judges, and what a calibration writes down."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

GROUPS = 7


def timed(tensor: torch.Tensor, work: Callable[[], object]) -> float:
    """Seconds of `work`, from when the tensor's device is idle until it is again."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    started = time.perf_counter()
    work()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - started


def undisturbed(tensor: torch.Tensor, work: Callable[[], object], seconds: float) -> float:
    """Seconds that `work` takes where nothing else is in its way: the least of what it takes in groups of calls, which take so
    many seconds together.

    Calls are grouped, so that a device that works off a queue is not waited for after each, and warm first.
    """
    work()
    once = max(timed(tensor, work), 1e-7)
    calls = max(1, min(1000, int(seconds / GROUPS / once)))

    def group() -> None:
        for _ in range(calls):
            work()

    return min(timed(tensor, group) for _ in range(GROUPS)) / calls


def product_seconds(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    """Of one product of two matrices, or of two stacks of them."""
    out = torch.matmul(left, right)
    return undisturbed(left, lambda: torch.matmul(left, right, out=out), seconds)


def all_reduce_seconds(tensor: torch.Tensor, rounds: int, group: dist.ProcessGroup | None = None) -> float:
    """Of one all-reduce on this process, as a rule. Called by all of the group."""
    seconds = []
    for _ in range(rounds + 1):  # the first time, connections are made
        dist.barrier(group)
        seconds.append(timed(tensor, lambda: dist.all_reduce(tensor, group=group)))
    return median(seconds[1:])
