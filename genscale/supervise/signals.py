"""SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (`--signal=USR1@60` of Slurm) and SIGHUP (the terminal, or ssh, is gone): a run ends with a
checkpoint, to be taken up again."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from genscale import exit_codes
from genscale.parallel.launcher import has_launcher

if TYPE_CHECKING:  # loads torch, and this module is the first to be read
    from genscale.parallel.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP_AT = "GENSCALE_STOP_AT"
"""In a job of Slurm: when to stop, in seconds since 1970, should the signal be lost that says so. It is where it comes while a
launcher, which must not heed it, has not started its processes yet."""
IMPATIENCE = 5.0
"""Seconds after which one more Ctrl-C means: now."""
START_SECONDS = 3.0
"""For a start to notice a signal; then it is waiting outside Python: for another process, or for a library."""
UNWIND_SECONDS = 7.0
"""For a start that has noticed it to end; then something that it closes is waiting."""


class Stopped(BaseException):
    """A signal came before the first step: there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class StopSignal:
    """Turns the signals that stop a run into a flag, which the loop reads between steps; used as a context manager.

    A launcher may pass the same signal on again, and a scheduler sends another one (SIGUSR1, later SIGTERM) while the
    checkpoint is being written: only the first counts. A second Ctrl-C five seconds later ends the process at once. Entered
    again within itself it changes nothing.

    Args:
        starting: until `loop_begins`, a signal raises Stopped where the program is: loading a library or a large data set
            takes minutes, in which no step is under way and nothing needs saving.

    Attributes:
        received: the number of the first signal that this process got.
        agreed: the number of the signal that all processes have agreed to stop for.
    """

    def __init__(self, starting: bool = False) -> None:
        self.received: int | None = None
        self.agreed: signal.Signals | None = None
        self._starting, self._depth = starting, 0
        self._pipe: int | None = None
        self._alarm: threading.Timer | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def agree(self, processes: Processes) -> bool:
        """Whether a process has received a signal; then `agreed` is that of the lowest rank that has. Collective."""
        number = self.received or 0
        if processes.sum_of_numbers(int(number > 0))[0]:
            self.agreed = signal.Signals(next(each for each in processes.gather(number) if each))
        return self.agreed is not None

    def loop_begins(self) -> None:
        self._starting = False

    def __enter__(self) -> StopSignal:
        if not self._depth and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS
                              if not _is_to_be_survived(number)}
            if self._starting:
                self._listen()
                self._set_alarm()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            if self._alarm is not None:
                self._alarm.cancel()
            if self._pipe is not None:
                signal.set_wakeup_fd(-1)
                os.write(self._pipe, b"\0")
                os.close(self._pipe)
                self._pipe = None
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        """Python answers a signal between two of its own instructions; a byte comes through this pipe at once."""
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._end_a_start_that_waits, args=(read,), name="signals", daemon=True).start()

    def _set_alarm(self) -> None:
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(os.environ[STOP_AT]) - time.time()
            seconds = min(max(seconds, 1), threading.TIMEOUT_MAX)
            self._alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
            self._alarm.daemon = True
            self._alarm.start()

    def _end_a_start_that_waits(self, pipe: int) -> None:
        while (number := os.read(pipe, 1)[0]) != 0:
            time.sleep(START_SECONDS)
            if number in SIGNALS and self._starting and self.received is None:
                os._exit(exit_codes.of_signal(number))
            if number in SIGNALS and self._starting:
                time.sleep(UNWIND_SECONDS)
                if self._starting and self._depth:
                    os._exit(exit_codes.of_signal(number))
        os.close(pipe)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            # A library that swallows the exception does not lose the signal: the loop will find it.
            if self._starting:
                raise Stopped(number)
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt


def _is_to_be_survived(number: int) -> bool:
    """nohup has it so; but torchrun listens to SIGHUP all the same, and ends what does not follow."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN and not has_launcher()
