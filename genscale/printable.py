"""What is shown to people: names, messages of servers and words of strangers must not steer the terminal that they reach.

Control characters (escape sequences among them), marks that turn the direction of writing and what is no character at all are
shown as `\\x1b`, `\\u202e`, `\\udcff`. Letters, signs and emoji of every script stay what they are.

And no work ends because nobody can read what is said of it: a stream that is closed, full, or whose reader has gone is dropped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

# C0 and C1 but for line breaks and tabs; line and paragraph separators; embeddings, overrides and isolates of direction;
# halves of surrogate pairs, as which Python holds bytes of a name that are not UTF-8; marks of annotations.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]")
_BREAKING = re.compile("[\t\n]")
_CURSOR_UP = re.compile(r"(\x1b\[A)+")
"""Between progress bars, written by itself."""
PATIENCE = 5.0
"""Seconds that the work waits once for a reader that has stopped reading; then it leaves lines out."""


def printable(text: str) -> str:
    """The text as one line."""
    return _BREAKING.sub(_code, printable_lines(text))


def printable_lines(text: str) -> str:
    """The text with its line breaks and tabs."""
    return _STEERING.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


class OutputLost(Exception):
    """What a verb is there to print cannot be written."""

    def __init__(self, error: Exception) -> None:
        super().__init__(_why(error))
        self.reader_gone = isinstance(error, BrokenPipeError)


class _Shown:
    """A stream of text that people see.

    Attributes:
        is_product: what is written is what the verb is there for: a failure raises OutputLost. Where it only tells of the work,
            the first failure drops the stream for good, and the work goes on.
        as_is: every character passes.
    """

    def __init__(self, stream: Any, bars: bool) -> None:
        self._stream, self._bars = open(os.devnull, "w") if stream is None else stream, bars  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")  # names need not be UTF-8, nor is every terminal
        self.is_product = self.as_is = False
        self._dropped = self._stuck = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text if self.as_is else self._printable(text)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _printable(self, text: str) -> str:
        start = end = ""
        if self._bars:  # which begin with a return to the start of the line, and are wiped out with one at the end
            if _CURSOR_UP.fullmatch(text):
                return text
            start, end = "\r" * text.startswith("\r"), "\r" * (len(text) > 1 and text.endswith("\r"))
        return f"{start}{printable_lines(text[len(start) : len(text) - len(end)])}{end}"

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._dropped:
            return
        try:
            if self.is_product or self._has_room():
                action()
        except BlockingIOError:  # another program has made the pipe one that does not wait
            pass
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if self.is_product:
                self._to_nowhere()
                raise OutputLost(error) from None
            self._drop(error)

    def _has_room(self) -> bool:
        """Whether the reader takes more; one that is stopped (Ctrl-S, a pager) is waited for once."""
        try:
            self._stuck = not has_room(self._stream.fileno(), 0 if self._stuck else PATIENCE)
        except (OSError, ValueError, AttributeError):  # no file of the system: in memory, or closed, as the write will tell
            return True
        return not self._stuck

    def _drop(self, error: Exception) -> None:
        self._to_nowhere()
        log = logging.getLogger("genscale")
        if log.hasHandlers():
            log.warning("standard %s is lost (%s); the work goes on without it, and this is said once",
                        "error" if self._bars else "output", _why(error))

    def _to_nowhere(self) -> None:
        """What is still in a buffer, what libraries print and what children inherit goes nowhere, too."""
        self._dropped = True
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def show_printable(is_product: bool = False) -> None:
    """From now on what this process prints is printable, tracebacks too.

    Args:
        is_product: standard output is what the verb is there for (see `OutputLost`). Standard error never is.
    """
    if not isinstance(sys.stdout, _Shown):
        sys.stdout = _Shown(sys.stdout, bars=False)
    if not isinstance(sys.stderr, _Shown):
        sys.stderr = _Shown(sys.stderr, bars=True)
    sys.stdout.is_product = is_product


def occupy_closed_streams() -> None:
    """Where this process was started without standard streams (`>&-`), the next files that it opens would become them, and get
    what libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def has_room(descriptor: int, seconds: float) -> bool:
    """Whether a write of some lines would not have to wait, now or within so many seconds. A failure counts as room."""
    watched = select.poll()
    watched.register(descriptor, select.POLLOUT)
    return bool(watched.poll(1000 * seconds))


def say_at_once(line: str) -> None:
    """A line on standard error, from a thread that may wait for nothing and nobody: no lock, no buffer, no reader."""
    with contextlib.suppress(OSError):
        if has_room(2, 0):
            os.write(2, f"{line}\n".encode())


@contextlib.contextmanager
def printed_as_is() -> Iterator[None]:
    """Meanwhile standard output takes every character, where it is no terminal: for what is a model's own text."""
    shown = sys.stdout
    if isinstance(shown, _Shown):
        shown.as_is = not shown.isatty()
    try:
        yield
    finally:
        if isinstance(shown, _Shown):
            shown.as_is = False


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
