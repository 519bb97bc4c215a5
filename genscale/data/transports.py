"""How the parts of batches come from where they are read, a thread or worker processes, to the training process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genscale.data.lanes import Data
from genscale.data.order import Cursors, Part, Share, read_parts
from genscale.data.worker_logs import Logs
from genscale.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data._utils.worker import WorkerInfo
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

CLOSE_SECONDS = 2.0
"""Longest wait for workers that close their data; then they are killed."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that mean the trainer, and reach its children too where a terminal or Slurm sends them."""


class _Failure:
    """An exception on its way to the consumer. (`DataLoader` would raise another of the same type, its message wrapped.)"""

    def __init__(self, error: Exception) -> None:
        if not isinstance(error, UserError):
            # A traceback does not travel between processes; a note does.
            error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError("".join(traceback.format_exception(error)))
        self.error = error


class Transport(ABC):
    """Carries parts from where they are read to the consumer."""

    @abstractmethod
    def _next(self) -> Part | _Failure: ...

    @abstractmethod
    def close(self) -> None: ...

    def get(self) -> Part:
        part = self._next()
        if isinstance(part, _Failure):
            self.close()
            raise part.error
        return part


class ThreadTransport(Transport):
    """A background thread: the tokenizer and the array work release the interpreter lock."""

    def __init__(self, data: Data, share: Share, batch: int, cursors: Cursors, prefetch_steps: int) -> None:
        self._stop = threading.Event()
        self._queue: queue.Queue[Part | _Failure] = queue.Queue(maxsize=prefetch_steps)
        parts = read_parts(data, share, 0, batch, cursors, self._stop.is_set)
        self._thread = threading.Thread(target=self._run, args=(parts,), name="data", daemon=True)
        self._thread.start()

    def _run(self, parts: Iterator[Part]) -> None:
        try:
            for part in parts:
                self._put(part)
        except Exception as error:
            self._put(_Failure(error))

    def _put(self, item: Part | _Failure) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _next(self) -> Part | _Failure:
        while self._thread.is_alive():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            raise RuntimeError("the data loader is closed") from None

    def close(self) -> None:
        self._stop.set()
        while not self._queue.empty():  # a thread that waits for room goes on, and sees the stop
            self._queue.get_nowait()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)


class _Stream(IterableDataset):
    """What a worker process runs: one part a global batch, so that `DataLoader`'s turns keep the workers in step."""

    def __init__(self, data: Data, share: Share, batch: int, cursors: Cursors) -> None:
        self._arguments = (data, share, batch, cursors)

    def __iter__(self) -> Iterator[Part | _Failure]:
        data, share, batch, cursors = self._arguments
        try:
            yield from read_parts(data, share, _worker().id, batch, cursors)
        except Exception as error:
            yield _Failure(error)

    def close(self) -> None:
        self._arguments[0].close()


def _worker() -> WorkerInfo:
    info = get_worker_info()
    assert info is not None  # asked in a worker
    return info


class WorkerTransport(Transport):
    """Worker processes through torch's `DataLoader`."""

    def __init__(self, data: Data, share: Share, batch: int, cursors: Cursors, prefetch_steps: int) -> None:
        # A forked copy of this process would inherit locks held by threads it does not have (gloo, CUDA, the tokenizer's pool).
        # A fork server was started afresh and has no threads; it imports torch once for all its workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, type(data).__module__])
        # A pipe, not an event: to set one waits for all that wait for it, also for those that were killed.
        self._stopping, self._stop = context.Pipe(duplex=False)
        loader = DataLoader(_Stream(data, share, batch, cursors), batch_size=None, num_workers=share.workers,
                            prefetch_factor=prefetch_steps, collate_fn=_as_is,
                            worker_init_fn=partial(_start_worker, self._stopping, Logs.here()),
                            multiprocessing_context=context,
                            # DataLoader draws a seed for its workers: not from the generator that the run's numbers come from.
                            generator=torch.Generator())
        with _interrupts_ignored():
            forkserver.ensure_running()
        try:
            with _script_not_run_again(data):
                self._iterator = cast("_MultiProcessingDataLoaderIter", iter(loader))
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # of a data set that somebody brought
            raise UserError(f"data.workers: {share.workers} processes cannot be given the data ({error}); define at the top of "
                            "a module what it holds (no lambda), or set data.workers to 0") from None
        self._closed = False

    def _next(self) -> Part | _Failure:
        if self._closed:
            raise RuntimeError("the data loader is closed")
        return next(self._iterator)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # They close their data (what it keeps back of the token cache), but do not first finish what they prefetch.
        os.write(self._stop.fileno(), b"." * len(self._iterator._workers))
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._iterator._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            worker.kill()
        self._stop.close()
        self._stopping.close()
        self._iterator._shutdown_workers()


def _as_is(part: Any) -> Any:  # a `Part` or a `_Failure`; without a batch size torch hands on what it got, not a list of it
    # Arrays go through the pipe: tensors would each hold a file descriptor, or fill a container's small /dev/shm.
    return part


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Children started meanwhile inherit the deafness to what stops a run. Where that reaches the whole process group (a
    terminal, Slurm) the trainer checkpoints first, for which the loader must still be whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _script_not_run_again(data: Data) -> Iterator[None]:
    """A worker would run the program's script first, and a script of a few lines that train would train in each. It is needed
    only where the data is of a class of its own (whoever writes one puts the training under `if __name__ == "__main__"`)."""
    main = sys.modules["__main__"]
    if any(type(each).__module__ == "__main__" for each in (data, *getattr(data, "__dict__", {}).values())):
        yield
        return
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    vars(main).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        vars(main).update(hidden)


def _start_worker(stop: Connection, logs: Logs, worker: int) -> None:
    """(torch has already limited the worker to one thread.)"""
    # torch has installed handlers of its own by now.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logs.follow()
    threading.Thread(target=_follow_parent, daemon=True).start()
    threading.Thread(target=_close_on, args=(stop, _worker().dataset), daemon=True).start()


def _follow_parent() -> None:
    """End with the trainer, also when it was killed: torch's own watch looks at the fork server, which outlives it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _close_on(stop: Connection, stream: _Stream) -> None:
    os.read(stop.fileno(), 1)
    stream.close()
    os._exit(0)
