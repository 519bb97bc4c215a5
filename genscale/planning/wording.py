"""Numbers of a plan in words: no more digits than are known."""

from __future__ import annotations

from genscale.planning.account import MemoryPart
from genscale.planning.plan import DAY, HOUR, Plan

NAMES = {"weights": "weights kept", "optimizer state": "optimizer state", "gathered weights": "weights gathered",
         "activations": "activations kept", "other": "other tensors", "CUDA and NCCL": "CUDA, NCCL, cuBLAS"}


def name(part: MemoryPart) -> str:
    """What a part of the memory is called."""
    return NAMES.get(part.category, part.category)


def gib(size: float) -> str:
    """In GiB, which stands elsewhere."""
    value = size / 2**30
    return f"{value:.1f}" if value >= 0.05 or not size else f"{value:.4f}" if value < 0.001 else f"{value:.3f}"


def size(number: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def rate(bytes_per_second: float) -> str:
    """A network's speed, in bits as its makers have it."""
    bits = 8 * bytes_per_second
    return f"{bits / 1e12:.1f} Tb/s" if bits >= 1e12 else f"{bits / 1e9:.0f} Gb/s"


def count(number: int) -> str:
    """A number of parameters."""
    for letter, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.2f}{letter}" if letter == "B" else f"{number / scale:.1f}{letter}"
    return str(number)


def rounded(number: float) -> str:
    """Three digits: the rest would be said without being known."""
    if number < 10:
        return f"{number:.3g}"
    digits = len(str(int(number))) - 3
    return f"{round(number, -digits):,.0f}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, scale in (("days", DAY), ("h", HOUR), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def digits(value: float) -> int:
    """Decimals of a time whose largest is this."""
    return 1 if value >= 10 else 2 if value >= 1 else 3


def measured(plan: Plan) -> bool:
    """Whether the machine was calibrated."""
    return plan.gpu.origin.startswith("measured")
