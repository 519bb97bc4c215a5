"""Filling token caches ahead of a run: parts of the sources, dealt to processes, in canonical order."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

from genscale.data.text.encoded import EncodedSource
from genscale.data.windows import Part
from genscale.errors import UserError

Work = tuple[int, Part, int]
"""(number of the source, what of it, its bytes)."""
Report = Callable[[int, int], None]
"""Told of progress: tokens made, bytes of parts finished (both since the last time)."""
REPORT_SECONDS = 0.5


def work_of(sources: Sequence[EncodedSource], processes: int) -> tuple[list[Work], int]:
    """The parts that are not complete in the caches, and the bytes of those that are."""
    work, done = [], 0
    for number, source in enumerate(sources):
        for part, size in source.source.parts(processes):
            if source.own_cache.training_rows(part) is None:
                work.append((number, part, size))
            else:
                done += size
    return work, done


def build(sources: Sequence[EncodedSource], work: Sequence[Work], processes: int, report: Report,
          stopped: Callable[[], bool]) -> None:
    """Tokenise the parts into the caches. What was written stays when this is stopped, or killed; calling again goes on.

    Args:
        sources: each with a cache.
        work: from `work_of`.
        processes: 1: this one, with the tokenizer's threads; more: each with one thread.
        report: called every now and then.
        stopped: asked often whether to end early.

    Raises:
        UserError: the source or the disk.
    """
    processes = min(processes, len(work))
    if processes <= 1:
        for tokens, size in _fill(sources, work, stopped):
            report(tokens, size)
        return
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Queue(), context.Event()
    with _interrupts_later():  # what is started here never gets them: this process tells the others when to end
        # Dealt round, so that the parts are finished about in canonical order.
        workers = [context.Process(target=_worker, args=(list(sources), list(work[i::processes]), progress, stop), daemon=True)
                   for i in range(processes)]
        for worker in workers:
            worker.start()
    try:
        _follow(workers, progress, report, stopped, stop)
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def _follow(workers: Sequence[Any], progress: Queue, report: Report, stopped: Callable[[], bool], stop: Any) -> None:
    running = len(workers)
    while running:
        if stopped():
            stop.set()
        try:
            message = progress.get(timeout=REPORT_SECONDS)
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise RuntimeError("a process of the build was killed") from None
            continue
        if isinstance(message, Exception):
            raise message
        running -= message is None
        if message is not None:
            report(*message)


def _fill(sources: Sequence[EncodedSource], work: Sequence[Work], stopped: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Progress, as `Report` has it. The caches are written out at the end, however it comes."""
    tokens, since = 0, time.monotonic()
    try:
        for number, part, size in work:
            source = sources[number]
            for window in source.source.sweep(part, source.own_cache.training_rows):
                for run in source.encode(window):
                    tokens += len(run.ids)
                    if stopped():
                        return
                    if time.monotonic() - since > REPORT_SECONDS:
                        yield tokens, 0
                        tokens, since = 0, time.monotonic()
            if not source.own_cache.writes:
                raise UserError(f"data.cache={source.own_cache.folder}: cannot be written any more (is the disk full?); make "
                                "room and run the same command again, what is there stays")
            yield tokens, size
            tokens = 0
    finally:
        for source in sources:
            source.close()


def _worker(sources: Sequence[EncodedSource], work: Sequence[Work], progress: Queue, stop: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for message in _fill(sources, work, stop.is_set):
            progress.put(message)
        progress.put(None)
    except UserError as error:
        progress.put(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    # Blocked, not ignored: starting takes seconds, and a Ctrl-C in them counts when they are over.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
