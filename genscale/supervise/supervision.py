"""What surrounds the steps of a run: who has its folder, who watches its progress, and who says how it ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

from genscale import exit_codes
from genscale.errors import UserError
from genscale.hook import Hook, Order, StepReport
from genscale.parallel.launcher import has_launcher
from genscale.parallel.processes import Processes, lost_peer
from genscale.supervise.ending import Ending, PeerLost
from genscale.supervise.run_folder import create_run_folder
from genscale.supervise.run_owner import RunOwner
from genscale.supervise.signals import Stopped, StopSignal
from genscale.supervise.watchdog import Watchdog
from genscale.tracking.run_logging import setup_logging

PATIENCE = 1.0
"""Seconds that a process whose peer is gone waits for a word about it. (A peer that fails by itself speaks first.)"""
LAUNCHER_PATIENCE = 3.0
"""The same where the peer may be one of this process's launcher, which then ends this one, and says why."""


def group_timeout_minutes(hang_minutes: float) -> float:
    """How long a collective may wait: longer than the watchdog, which knows more; for ever (a week) where there is none."""
    return max(30.0, 2 * hang_minutes) if hang_minutes else 7 * 24 * 60.0


class Supervision:
    """A run's folder, made and claimed, its log, watchdog and `ended.json`; a context manager around all that the run does.

    An error that comes out of it is raised again in the process that is to speak, and becomes SystemExit with the same exit
    code in the others.

    Args:
        hang_minutes: without progress, after which the run ends (0: never).

    Attributes:
        stop: the signals received so far.
        owner: of the run folder; on rank 0 only.
    """

    _watchdog: Watchdog  # from `__enter__` on

    def __init__(self, hang_minutes: float, folder: Path, processes: Processes, stop: StopSignal) -> None:
        self.folder, self.processes, self.stop = folder, processes, stop
        self.owner: RunOwner | None = None
        self._ending = Ending(folder, processes.rank)
        self._hang_minutes = hang_minutes

    def __enter__(self) -> Supervision:
        self._ending.claim_number = self.processes.main_does(self._begin)
        try:
            setup_logging(self.folder, self.processes.rank)
            self._watchdog = Watchdog(self.folder, self.processes, self._ending, self._hang_minutes, self.owner)
            self._watchdog.start()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self._fall(error)
        finally:
            self._watchdog.close()
            self._release()

    def loop_begins(self, step: int) -> None:
        """The loop starts after `step`: signals are for it, and progress is expected."""
        self._ending.step = step
        self.stop.loop_begins()
        self._watchdog.loop_begins()

    def hook(self) -> Hook:
        """Keeps the number of the step that is done."""
        return _StepDone(self._ending)

    def loop_ends(self) -> None:
        self._watchdog.loop_ends()

    def failed(self, error: BaseException) -> None:
        """To be told at once, before anything is closed: what this process brings down must not speak first."""
        if not isinstance(error, Stopped):
            # A launcher ends all processes as soon as one has failed, perhaps one that leaves the word to this one: its signal
            # has nothing to stop any more, and must not be what is told.
            self.stop.loop_begins()
        if not _is_consequence(error):
            self._ending.failed(error)

    def ended(self, stopped_by: signal.Signals | None) -> None:
        """The run came to its end, or to that of a step."""
        if self.processes.is_main and stopped_by:
            self._ending.claim("stopped", exit_codes.of_signal(stopped_by), stopped_by)
        elif self.processes.is_main:
            self._ending.claim("complete", exit_codes.DONE)

    def _begin(self) -> int:
        create_run_folder(self.folder)
        try:
            self.owner = RunOwner(self.folder, lambda line: print(line, file=sys.stderr, flush=True))
            self._ending.clear()
            Watchdog.clear(self.folder)
            return self.owner.number
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.folder} ({error.strerror}); free some space, or set --run.dir to "
                            "another folder") from None

    def _fall(self, error: BaseException) -> None:
        self.failed(error)
        if _is_consequence(error):
            launched_together = has_launcher() and os.environ.get("LOCAL_WORLD_SIZE") != "1"
            deadline = time.monotonic() + (LAUNCHER_PATIENCE if launched_together else PATIENCE)
            while self._ending.said() is None and time.monotonic() < deadline:
                if self.stop.received and has_launcher():  # which ends this process, and says which one ended first, and how
                    raise SystemExit(exit_codes.of_signal(self.stop.received)) from None
                time.sleep(0.1)
            if self._ending.said() is None:
                gone = PeerLost(f"another process of the run is gone ({self.folder}/logs may say why); start the run again, "
                                "and it goes on from its latest checkpoint")
                self._ending.failed(gone)
                if self._ending.is_ours():
                    raise gone from None
        if not self._ending.is_ours():
            raise SystemExit((self._ending.said() or {}).get("exit_code", exit_codes.OUR_ERROR)) from None

    def _release(self) -> None:
        if self.owner is not None:
            self.owner.release()


class _StepDone(Hook):
    name, order, settled = "step", Order.SUPERVISE, False

    def __init__(self, ending: Ending) -> None:
        self._ending = ending

    def step(self, report: StepReport) -> None:
        self._ending.step = report.step


def _is_consequence(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and lost_peer(error)
