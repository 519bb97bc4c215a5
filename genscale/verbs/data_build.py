"""genscale data build: the token cache is filled ahead of a run, by processes beside each other."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.encoded import EncodedSource
from genscale.errors import UserError

LINE_SECONDS = 10.0


def fill_cache(settings: TextDataSettings, processes: int) -> int:
    """Tokenise what is not yet in `data.cache`. Returns the exit code. Raises UserError."""
    if settings.cache is None:
        raise UserError("data.cache=None: there is nothing to build; set the folder of the token cache")
    data = TextData(settings, seed=0)
    sources = [stream.encoded for stream in data.streams if stream.encoded is not None]  # all: pairs have no cache
    work, done = work_of(sources, processes)
    interrupted: list[int] = []
    started = time.monotonic()
    with _noting_signals(interrupted), _Meter(sum(size for _, _, size in work) + done, done) as meter:
        build(sources, work, processes, meter.add, lambda: bool(interrupted))
    seconds = time.monotonic() - started
    if work:
        print(f"{meter.tokens:,} tokens in {seconds:,.1f} s by {min(processes, len(work))} process(es): "
              f"{meter.tokens / max(seconds, 1e-9):,.0f} tokens/s")
    _print_totals(settings.cache, data, sources)
    if interrupted:
        print("interrupted: what is above stays; run the same command to go on")
        return 128 + interrupted[0]
    print(f"complete: train with --data.cache {settings.cache}")
    return 0


def _print_totals(cache: str, data: TextData, sources: list[EncodedSource]) -> None:
    for stream, source in zip(data.streams, sources, strict=True):
        totals = source.own_cache.totals(len(source.source.sizes()))
        label = f" {stream.label}" if len(sources) > 1 else ""
        print(f"{cache}{label}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, "
              f"{totals['bytes'] / max(1, totals['tokens']):.2f} bytes of text a token, {totals['size'] / 1e6:,.1f} MB")


@contextmanager
def _noting_signals(into: list[int]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP ask for an end; nothing is interrupted in the middle of a write."""
    def note(number: int, _: object) -> None:
        into.append(number)

    stops = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        stops.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Progress: a bar on a terminal, a line every so often elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self.tokens, self._total, self._done = 0, total, done
        self._first, self._last = time.monotonic(), time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total or None, initial=done, unit="B", unit_scale=True, desc="tokenising")

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, tokens: int, size: int) -> None:
        self.tokens += tokens
        self._done += size
        rate = self.tokens / max(1e-9, time.monotonic() - self._first)
        if self._bar is not None:
            self._bar.update(size)
            self._bar.set_postfix_str(f"{self.tokens / 1e6:.1f} M tokens, {rate:,.0f}/s")
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            share = f"{100 * self._done / self._total:.0f} %, " if self._total else ""
            print(f"{share}{self.tokens:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
