"""How long something takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(tensor: torch.Tensor, work: Callable[[], object]) -> float:
    """Seconds of `work`, from when the tensor's device is idle until it is again."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    started = time.perf_counter()
    work()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - started
