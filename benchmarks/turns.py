"""What a comparison says: contestants took turns, and one of them ran twice, which is how far apart equals come out."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What a step took in one turn of a contestant: seconds by the clock, and of CPU time."""

    seconds: float
    cpu_seconds: float


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """So many other processes that never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """An order for every round, for ever: each name comes first, in the middle and last, before and after each other."""
    while True:
        for first in range(len(names)):
            turned = [*names[first:], *names[:first]]
            yield turned
            yield turned[::-1]


def take_turns(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list[Turn]]:
    """The turns of contestants that live in this process, step by step; the first `warmup` of them do not count.

    CPU time is of the training thread: exact with one thread, and without the loader's thread, which works beside all of them.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in steps}
    for _, order in zip(range(warmup + rounds), orders(list(steps)), strict=False):
        for name in order:
            began, cpu_began = time.perf_counter(), time.thread_time()
            steps[name]()
            cpu_seconds, seconds = time.thread_time() - cpu_began, time.perf_counter() - began
            turns[name].append(Turn(seconds, cpu_seconds))
    return {name: of[warmup:] for name, of in turns.items()}


def compared(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians, the first contestant's over the second's, and the control: the third's, which is the second once more.

    Returns:
        `ratio_of_medians`, of seconds and of CPU seconds; `quartiles_of_ratios` of the pairs of a round, as the machine was in
        the same state for both. Each also in `control`, where it would be 1 on a machine that does nothing else.
    """
    ours, theirs, control = turns.values()
    return {"rounds": len(ours),
            "median_step_seconds": {name: median(turn.seconds for turn in of) for name, of in turns.items()},
            "median_step_cpu_seconds": {name: median(turn.cpu_seconds for turn in of) for name, of in turns.items()},
            **_ratios(ours, theirs), "control": _ratios(control, theirs)}


def _ratios(ours: list[Turn], theirs: list[Turn]) -> dict[str, Any]:
    pairs = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    return {"ratio_of_medians": round(median(a.seconds for a in ours) / median(b.seconds for b in theirs), 4),
            "quartiles_of_ratios": [round(value, 4) for value in statistics.quantiles(pairs, n=4, method="inclusive")],
            "ratio_of_cpu_medians": round(median(a.cpu_seconds for a in ours) / median(b.cpu_seconds for b in theirs), 4)}


def median(values: Any) -> float:
    """To five digits, of which a clock gives fewer."""
    return float(f"{statistics.median(values):.5g}")
