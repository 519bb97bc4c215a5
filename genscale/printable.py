"""What is shown to people: names, messages of servers and words of strangers must not steer the terminal that they reach.

Control characters (escape sequences among them), marks that turn the direction of writing and what is no character at all are
shown as `\\x1b`, `\\u202e`, `\\udcff`. Letters, signs and emoji of every script stay what they are.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# C0 and C1 but for line breaks and tabs; line and paragraph separators; embeddings, overrides and isolates of direction;
# halves of surrogate pairs, as which Python holds bytes of a name that are not UTF-8; marks of annotations.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]")
_BREAKING = re.compile("[\t\n]")
_CURSOR_UP = re.compile(r"(\x1b\[A)+")
"""Between progress bars, written by itself."""


def printable(text: str) -> str:
    """The text as one line."""
    return _BREAKING.sub(_code, printable_lines(text))


def printable_lines(text: str) -> str:
    """The text with its line breaks and tabs."""
    return _STEERING.sub(_code, text)


def _code(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


class _Shown:
    """A stream of text that people see."""

    def __init__(self, stream: Any, bars: bool) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        start = end = ""
        if self._bars:  # which begin with a return to the start of the line, and are wiped out with one at the end
            if _CURSOR_UP.fullmatch(text):
                return self._stream.write(text)
            start, end = "\r" * text.startswith("\r"), "\r" * (len(text) > 1 and text.endswith("\r"))
        self._stream.write(f"{start}{printable_lines(text[len(start) : len(text) - len(end)])}{end}")
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def show_printable() -> None:
    """From now on what this process prints is printable, tracebacks too."""
    if not isinstance(sys.stdout, _Shown):
        sys.stdout = _Shown(sys.stdout, bars=False)
    if not isinstance(sys.stderr, _Shown):
        sys.stderr = _Shown(sys.stderr, bars=True)


@contextlib.contextmanager
def printed_as_is() -> Iterator[None]:
    """Meanwhile standard output takes every character, where it is no terminal: for what is a model's own text."""
    shown = sys.stdout
    if isinstance(shown, _Shown) and not shown.isatty():
        sys.stdout = shown._stream
    try:
        yield
    finally:
        sys.stdout = shown
