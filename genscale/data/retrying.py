"""Trying again what failed for reasons that pass, with growing pauses; every repetition is counted."""

from __future__ import annotations

import email.utils
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

log = logging.getLogger("genscale")
S = TypeVar("S")
T = TypeVar("T")
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
"""Seconds between tries, but for `Retry-After`."""
LOG_SECONDS = 10.0
"""At most one line on retries in so many seconds."""


class Passing(Exception):
    """A failure that another try may mend; `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Retries:
    """Counts tries that failed and were repeated in this process, and says so now and then."""

    def __init__(self) -> None:
        self._lock, self._taken, self._total, self._told = threading.Lock(), 0, 0, -LOG_SECONDS

    def add(self, what: str, reason: str, delay: float) -> None:
        with self._lock:
            self._total += 1
            if time.monotonic() - self._told < LOG_SECONDS:
                return
            self._told, total = time.monotonic(), self._total
        log.warning("%s: %s; trying again in %.1f s (retry %d)", what, " ".join(reason.split()), delay, total)

    def take(self) -> int:
        """Retries since this was last asked."""
        with self._lock:
            new, self._taken = self._total - self._taken, self._total
        return new


retries = Retries()


def persist(attempt: Callable[[], T], what: str, minutes: float) -> T:
    """What `attempt` returns, once it does so without `Passing`.

    Raises:
        Passing: that of the last try, which is made as `minutes` have gone by, whatever the server asks to wait.
    """
    started, tries = time.monotonic(), 0
    while True:
        try:
            return attempt()
        except Passing as failure:
            # Not the run's own random numbers: those would differ from an undisturbed run's.
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2**tries) * random.SystemRandom().uniform(0.5, 1.0)
            left = 60 * minutes - (time.monotonic() - started)
            if left <= 0:
                raise
            delay = min(max(delay, failure.after), left)  # the last try is when patience ends
            retries.add(what, str(failure), delay)
            time.sleep(delay)
            tries += 1


def in_threads(do: Callable[[S], T], items: Sequence[S], most: int) -> list[T]:
    """What `do` makes of each item, by `most` threads at a time. A signal that ends the program ends the wait for them: they
    do not keep the interpreter, as a pool's threads would."""
    todo = list(enumerate(items))
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while todo:
            try:
                number, item = todo.pop()
            except IndexError:  # another thread was faster
                return
            try:
                done.put((number, do(item), None))
            except BaseException as error:
                done.put((number, None, error))

    for _ in range(min(most, len(items))):
        threading.Thread(target=work, daemon=True).start()
    made: dict[int, T] = {}
    for _ in items:
        number, result, error = done.get()
        if error is not None:
            raise error
        made[number] = result
    return [made[number] for number in range(len(items))]


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait, which it gives as a number or as a date; 0 where it does not."""
    text = headers.get("Retry-After", "").strip()
    try:
        if text.isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
