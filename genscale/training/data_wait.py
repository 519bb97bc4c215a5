"""What to do about steps that wait for their data: one hint a run, with the setting to change and a value to try."""

from __future__ import annotations

import os
from typing import Any

SHARE = 0.05
"""Share of a step's time, from which on waiting is worth a hint."""


class DataWait:
    """Watches the intervals between log lines.

    Args:
        settings: the `data` section.
        processes: training processes on this machine, among which its cores are divided.
    """

    def __init__(self, settings: Any, processes: int) -> None:
        self._settings, self._processes = settings, processes
        self._intervals, self._hinted = 0, False

    def hint(self, share: float) -> str | None:
        """What to change, the first time that an interval waited for more than `SHARE` of its time. The first interval does not
        count: the loader starts in it."""
        self._intervals += 1
        if self._hinted or self._intervals == 1 or share <= SHARE or not hasattr(self._settings, "workers"):
            return None
        self._hinted = True
        return f"steps wait for data {share:.0%} of their time; try {advice(self._settings, cores(self._processes))}"


def cores(processes: int) -> int:
    """Cores of this machine for each of so many processes; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def advice(settings: Any, cores: int) -> str:
    """The first setting that is likely to help: more workers as long as there are cores, then a cache of the tokens, then a
    deeper prefetch, which only evens out.

    Args:
        settings: the `data` section.
        cores: of the machine, for each training process.
    """
    workers = settings.workers
    if workers + 1 < cores:  # the training process keeps one
        return f"data.workers={min(max(1, 2 * workers), cores - 1)} (it is {workers})"
    if getattr(settings, "cache", "") is None:
        return "data.cache=FOLDER, which keeps the tokens (it is not set)"
    return f"data.prefetch_steps={2 * settings.prefetch_steps} (it is {settings.prefetch_steps})"
