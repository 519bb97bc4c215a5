"""genscale data build|inspect: fill the token cache ahead of a run, and see what a run would train on."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jsonargparse.typing import PositiveInt

from genscale.config_parser import parse_config, parse_settings, take_number
from genscale.data.cache_build import build, work_of
from genscale.data.encoded import EncodedSource
from genscale.data.images import ImageDataSettings
from genscale.data.text import TextData, TextDataSettings
from genscale.errors import UserError, nearest
from genscale.objectives import FAMILIES
from genscale.verbs.data_inspect import inspect
from genscale.verbs.image_inspect import inspect_images

ACTIONS = {"build": "Fill the token cache (data.cache) ahead of a run; stopped and started again, it goes on where it was.",
           "inspect": "Show what would be trained on (with --config FILE: by that run): a few blocks of text and what is "
                      "known of their documents, or the number, classes and damage of images."}
LINE_SECONDS = 10.0


@dataclass
class BuildSettings:
    """What to tokenise."""

    data: TextDataSettings = field(default_factory=TextDataSettings)
    processes: PositiveInt | None = None
    """Processes that tokenise beside each other (default: one for each core)."""


@dataclass
class InspectSettings:
    """What to look at."""

    data: TextDataSettings = field(default_factory=TextDataSettings)
    seed: int = 1337
    """The run's seed, on which the order of the documents depends."""
    blocks: PositiveInt = 3
    """Blocks to show."""


def main(arguments: list[str]) -> int:
    action = arguments[0] if arguments else ""
    if action in ("-h", "--help"):
        print("\n".join(["usage: genscale data build|inspect [settings]", "",
                         *(f"  {name:<9}{meaning}" for name, meaning in ACTIONS.items())]))
        return 0
    if action not in ACTIONS:
        raise UserError(f"genscale data: '{action}' is not one of: {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")
    if action == "inspect" and any(word.startswith(("--config", "--model.family")) for word in arguments[1:]):
        return _inspect_run(arguments[1:])
    kind = BuildSettings if action == "build" else InspectSettings
    settings = parse_settings(kind, arguments[1:], f"genscale data {action}", ACTIONS[action])
    if action == "build":
        return _build(settings)
    with _notes_on_stderr():
        return inspect(settings.data, settings.seed, settings.blocks)


def _inspect_run(arguments: list[str]) -> int:
    """What the run of a config would train on."""
    blocks, rest = take_number(arguments, "--blocks", least=1)
    config = parse_config(FAMILIES, rest, "genscale data inspect", ACTIONS["inspect"])
    with _notes_on_stderr():
        if isinstance(config.data, TextDataSettings):
            return inspect(config.data, config.run.seed, blocks or InspectSettings.blocks)
        if isinstance(config.data, ImageDataSettings):
            return inspect_images(config.data, config.run.seed)
    raise UserError(f"model.family={config.model.family}: its data is made up as it is needed; there is nothing to inspect")


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """What a run would log about its data, such as what it leaves out."""
    logger, handler = logging.getLogger("genscale.data"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _build(settings: BuildSettings) -> int:
    if settings.data.cache is None:
        raise UserError("data.cache=None: there is nothing to build; set the folder of the token cache")
    processes = settings.processes or len(os.sched_getaffinity(0))
    data = TextData(settings.data, seed=0)
    sources = [stream.encoded for stream in data.streams]
    work, done = work_of(sources, processes)
    interrupted: list[int] = []
    started = time.monotonic()
    with _noting_signals(interrupted), _Meter(sum(size for _, _, size in work) + done, done) as meter:
        build(sources, work, processes, meter.add, lambda: bool(interrupted))
    seconds = time.monotonic() - started
    if work:
        print(f"{meter.tokens:,} tokens in {seconds:,.1f} s by {min(processes, len(work))} process(es): "
              f"{meter.tokens / max(seconds, 1e-9):,.0f} tokens/s")
    _print_totals(settings.data.cache, data, sources)
    if interrupted:
        print("interrupted: what is above stays; run the same command to go on")
        return 128 + interrupted[0]
    print(f"complete: train with --data.cache {settings.data.cache}")
    return 0


def _print_totals(cache: str, data: TextData, sources: list[EncodedSource]) -> None:
    for stream, source in zip(data.streams, sources, strict=True):
        totals = source.cache.totals(len(source.source.sizes()))
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
