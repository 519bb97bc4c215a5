"""A rank's micro-batches of every global batch, loaded while the step runs; its position lets any shape continue."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genscale.data.lanes import Data
from genscale.data.order import DIGEST_MODULUS, Cursors, Part, Share, furthest, merge_states, read_parts
from genscale.data.worker_logs import Logs
from genscale.errors import UserError

__all__ = ["StepLoader", "merge_states"]

CLOSE_SECONDS = 2.0
"""Longest wait for workers that close their data; then they are killed."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that mean the trainer, and reach its children too where a terminal or Slurm sends them."""


class StepLoader:
    """Global batches of any `Data`, as this rank's micro-batches.

    Args:
        data: what to read.
        global_batch_size, micro_batch_size: samples; global batch = micro-batch x world_size x accumulation.
        rank, world_size: this process among those of the run.
        workers: processes that load (0: a background thread).
        prefetch_steps: global batches to load ahead.
        state: where to continue: `merge_states` of all ranks' `state()`, taken at any shape.
        left_out: numbers of global batches that are read and dropped, as if the data had never had them: the samples that
            follow are numbered without a gap.
        pin_memory: page-locked batches, from which a GPU copies while the host goes on.

    Attributes:
        wait_seconds: how long the last `next_batch` was held up.
        batch: number of the global batch that `next_batch` gave last, those left out counted.
        retries: requests to web servers that were repeated for the batches so far.
    """

    wait_seconds: float = 0.0
    retries: int = 0

    def __init__(self, data: Data, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int, workers: int,
                 prefetch_steps: int, state: dict[str, Any] | None = None, pin_memory: bool = False,
                 left_out: Collection[int] = ()) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(f"global batch {global_batch_size} is not a multiple of {micro_batch_size} x {world_size}")
        self._micro = micro_batch_size
        self._pin_memory = pin_memory
        self._share = Share(global_batch_size, rank, world_size, max(workers, 1))
        transport = _Processes if workers else _Thread
        self._open = lambda batch, cursors: transport(data, self._share, batch, cursors, prefetch_steps)
        self._start(state or {"batches": 0, "cursors": {}}, left_out)
        # Workers ignore SIGTERM, by which interpreter exit would end them: an unclosed loader must not hang it.
        atexit.register(self.close)

    def _start(self, state: dict[str, Any], left_out: Collection[int]) -> None:
        self._batches = int(state["batches"])
        self._cursors: Cursors = dict(state["cursors"])
        self._left_out = frozenset(left_out)
        self._digest = 0
        self._peeked: list[Part] | None = None
        self._parts = self._open(self._batches, dict(self._cursors))

    def go_back(self, state: dict[str, Any], left_out: Collection[int]) -> None:
        """Begin again at an earlier `state`, with other batches left out."""
        self._parts.close()
        self._start(state, left_out)

    def next_batch(self) -> list[dict[str, torch.Tensor]]:
        """The rank's micro-batches of the next global batch.

        Each holds the samples' arrays stacked, `(micro, ...)` (signed integers as int64), and `sample`: `(micro,)` int64
        global sample numbers.

        Raises:
            Exception: whatever the data raised, as itself.
        """
        started = time.perf_counter()
        parts = self._peeked or self._read()
        self._peeked = None
        micro_batches = self._micro_batches(parts)
        self._take(parts)
        self.batch = self._batches - 1
        self.wait_seconds = time.perf_counter() - started
        return micro_batches

    def peek(self) -> list[dict[str, torch.Tensor]]:
        """What `next_batch` will give; the position stays."""
        self._peeked = self._peeked or self._read()
        return self._micro_batches(self._peeked)

    def _read(self) -> list[Part]:
        """The parts of the next batch that is not left out."""
        while True:
            parts = [self._parts.get() for _ in range(self._share.workers)]
            if self._batches not in self._left_out:
                return parts
            self._take(parts)

    def _take(self, parts: list[Part]) -> None:
        """The position moves on past a batch."""
        for part in parts:
            furthest(self._cursors, part.cursors)
        self._digest = sum(part.digest for part in parts) % DIGEST_MODULUS
        self.retries += sum(part.retries for part in parts)
        self._batches += 1

    def _micro_batches(self, parts: list[Part]) -> list[dict[str, torch.Tensor]]:
        batch, own = self._batches, self._share.global_batch_size // self._share.world_size
        arrays = _join(parts, [self._share.slots(batch, worker) for worker in range(len(parts))], own, self._pin_memory)
        given = batch - sum(number < batch for number in self._left_out)
        first = given * self._share.global_batch_size + self._share.rank
        arrays["sample"] = torch.arange(first, first + own * self._share.world_size, self._share.world_size)
        return [{name: array[i : i + self._micro] for name, array in arrays.items()} for i in range(0, own, self._micro)]

    def state(self) -> dict[str, Any]:
        """The position right after the last batch that `next_batch` returned, as JSON; join the ranks' with `merge_states`."""
        return {"batches": self._batches, "cursors": dict(self._cursors)}

    def digest(self) -> int:
        """Ledger entry of the last batch: its sum over ranks, modulo 2**61, is the same at any shape."""
        return self._digest

    def close(self) -> None:
        """End threads and processes; promptly, and as often as you like."""
        atexit.unregister(self.close)
        self._parts.close()


def _join(parts: list[Part], slots: list[slice], size: int, pin_memory: bool) -> dict[str, torch.Tensor]:
    """The workers' parts of a batch in the order of the samples."""
    joined: dict[str, torch.Tensor] = {}
    for part, slot in zip(parts, slots, strict=True):
        for name, array in part.arrays.items():
            if name not in joined:
                # uint8 stays: it is what images travel as.
                dtype = np.int64 if np.issubdtype(array.dtype, np.signedinteger) else array.dtype
                dtype = torch.from_numpy(np.empty(0, dtype)).dtype
                joined[name] = torch.empty((size, *array.shape[1:]), dtype=dtype, pin_memory=pin_memory)
            joined[name].numpy()[slot] = array
    return joined


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


class _Transport(ABC):
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


class _Thread(_Transport):
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
            yield from read_parts(data, share, get_worker_info().id, batch, cursors)
        except Exception as error:
            yield _Failure(error)

    def close(self) -> None:
        self._arguments[0].close()


class _Processes(_Transport):
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
        self._iterator = iter(loader)
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


def _as_is(part: Part | _Failure) -> Part | _Failure:
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


def _start_worker(stop: Connection, logs: Logs, worker: int) -> None:
    """(torch has already limited the worker to one thread.)"""
    # torch has installed handlers of its own by now.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logs.follow()
    threading.Thread(target=_follow_parent, daemon=True).start()
    threading.Thread(target=_close_on, args=(stop, get_worker_info().dataset), daemon=True).start()


def _follow_parent() -> None:
    """End with the trainer, also when it was killed: torch's own watch looks at the fork server, which outlives it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _close_on(stop: Connection, stream: _Stream) -> None:
    os.read(stop.fileno(), 1)
    stream.close()
    os._exit(0)
