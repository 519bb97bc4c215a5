"""The text that a vocabulary is learnt from, as it is read: how far it is, and no further than asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines of progress in a log."""

Progress = Callable[[int, int, bool], None]
"""Told (documents, bytes of text, whether that is all) after each document."""


def reported(texts: Iterator[str], progress: Progress | None, megabytes: int | None) -> Iterator[str]:
    """The texts, up to `megabytes` of them (the last one whole), their number reported."""
    documents = size = 0
    for text in texts:
        documents, size = documents + 1, size + len(text.encode())
        yield text
        if progress:
            progress(documents, size, False)
        if megabytes is not None and size >= megabytes * 10**6:
            break
    if progress:
        progress(documents, size, True)


def console_progress() -> Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds."""
    started = printed = time.monotonic()
    bar = tqdm(unit="B", unit_scale=True, desc="reading") if sys.stderr.isatty() else None

    def report(documents: int, size: int, done: bool) -> None:
        nonlocal printed
        now = time.monotonic()
        if bar is not None:
            bar.update(size - bar.n)
            if done:
                bar.close()
        if done or (bar is None and now - printed >= SECONDS):
            printed = now
            line = f"read {size / 1e6:,.1f} MB in {documents:,} documents ({size / 1e6 / max(now - started, 1e-9):,.1f} MB/s)"
            print(line + ("; learning the vocabulary" if done else ""), file=sys.stderr, flush=True)

    return report
