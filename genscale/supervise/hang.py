"""Which process holds the others up, from what each was doing and its stack."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
WAITING_FILES = ("/torch/distributed/", "/deepspeed/comm/")
# Of the host for a device or, in DistributedDataParallel, for the gradients of the others; both wait outside Python.
WAITING_FUNCTIONS = ("_engine_run_backward", "synchronize")


@dataclass(frozen=True)
class Frame:
    """The innermost line of Python that a process is at."""

    file: str
    line: int
    function: str

    @property
    def waits(self) -> bool:
        """Whether this is where a process waits for the others."""
        return any(part in self.file for part in WAITING_FILES) or self.function in WAITING_FUNCTIONS


@dataclass(frozen=True)
class Report:
    """What is known of a process of a run that makes no progress.

    Attributes:
        doing, beats: its last note and how many it had made (see `Processes.note`).
        silent: its heartbeat has stopped, too.
        frame: of its main thread; None where its stack could not be had.
    """

    rank: int
    host: str
    pid: int
    doing: str
    beats: int
    silent: bool
    frame: Frame | None

    def __str__(self) -> str:
        where = f", in {self.frame.file}:{self.frame.line} ({self.frame.function})" if self.frame else ""
        return f"at {self.doing}{where}"


def innermost(stacks: str, thread: str) -> Frame | None:
    """The innermost frame of a thread, from what `faulthandler` wrote.

    Args:
        thread: its identity as written there, `0x00007f74ae21bb80`.
    """
    lines = stacks.splitlines()
    for heading, first in itertools.pairwise(lines):
        if thread and f"hread {thread} " in heading and (found := FRAME.match(first)):
            return Frame(found["file"], int(found["line"]), found["function"])
    return None


def verdict(reports: Sequence[Report]) -> str:
    """Names the process that holds the others up, and where it is. Pass the reports of all, in the order of their ranks."""
    silent = [report for report in reports if report.silent]
    busy = [report for report in reports if report.frame and not report.frame.waits]
    behind = [report for report in reports if report.beats == min(each.beats for each in reports)]
    for suspects, what in ((silent, "does not answer (stopped, or its machine is gone)"), (busy, "hangs")):
        if suspects:
            return _line(suspects[0], what)
    if len(behind) < len(reports):
        return _line(behind[0], "is behind the others")
    return f"every process waits for the others, {reports[0]}"


def _line(report: Report, what: str) -> str:
    return f"rank {report.rank} (process {report.pid} on {report.host}) {what} {report}"
