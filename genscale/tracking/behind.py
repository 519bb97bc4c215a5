"""A tracker in a thread of its own: no step waits for its start, nor for what it does with what it is given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

LONGEST = 60.0
"""Seconds that the end of a run waits for a tracker; its own time-outs are shorter."""


class Behind:
    """Starts the tracker when it is told to begin, and gives it in their order what it was asked to do before that and after.

    Args:
        build: starts the tracker. It, and whatever the tracker is asked to do, may raise: the tracker is then dropped.
        report: takes the error, and the tracker if it had started. From that thread.
    """

    def __init__(self, build: Callable[[], Any], report: Callable[[Exception, Any], None]) -> None:
        self._build, self._report = build, report
        self._asked: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        # A daemon, for a tracker that never comes back must not hold up the end of the process.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._begun = self._dropped = False

    def begin(self) -> None:
        """Once more does nothing."""
        if not self._begun:
            self._begun = True
            self._thread.start()

    def ask(self, action: Callable[[Any], None]) -> None:
        """`action` is called with the tracker, soon."""
        if not self._dropped:
            self._asked.put(action)

    def close(self, exit_code: int) -> None:
        """Wait until all is done and the tracker closed. One that has not begun is started only if there is something to say:
        what it was asked to do, or that the run has failed."""
        if exit_code or not self._asked.empty():
            self.begin()
        if not self._begun:
            return
        self.ask(lambda tracker: tracker.close(exit_code))
        self._asked.put(None)
        self._thread.join(LONGEST)
        if self._thread.is_alive():
            self._report(TimeoutError(f"it did not end within {LONGEST:g} s of the run's end"), None)

    def _work(self) -> None:
        tracker = None
        try:
            tracker = self._build()
            while (action := self._asked.get()) is not None:
                action(tracker)
        except Exception as error:  # whatever it is, it must not cost the run
            self._dropped = True
            self._report(error, tracker)
            if tracker is not None:
                with contextlib.suppress(Exception):
                    tracker.close(1)  # its threads and files
