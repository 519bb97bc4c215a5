"""What ends a run early: a signal, or a loss that is no longer a number."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from genscale.errors import UserError


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite: a matter of settings or data, so one line for the user."""


class StopSignal:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a flag that the loop reads between steps; used as a context manager.

    A launcher may pass the same Ctrl-C on again, so repeats within five seconds count as one; a later one ends the
    process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._since > 5:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._since = number, time.monotonic()
