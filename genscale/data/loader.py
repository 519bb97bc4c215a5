"""A rank's micro-batches of every global batch, loaded while the step runs; its position lets any shape continue."""

from __future__ import annotations

import atexit
import time
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from genscale.data.lanes import Data
from genscale.data.order import DIGEST_MODULUS, Cursors, Part, Share, furthest
from genscale.data.transports import ThreadTransport, WorkerTransport


class StepLoader:
    """Global batches of any `Data`, as this rank's micro-batches.

    Args:
        data: what to read.
        global_batch_size, micro_batch_size: samples; global batch = micro-batch x world_size x accumulation.
        rank, world_size: this process among those that read different samples.
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
        lanes = data.lane_count if data.cursor_at(1) is None else None
        self._share = Share(global_batch_size, rank, world_size, max(workers, 1), lanes)
        transport = WorkerTransport if workers else ThreadTransport
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
        if len(parts) == 1:  # of each lane nobody is further
            self._cursors.update(parts[0].cursors)
        else:
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
        if own == self._micro:
            return [arrays]
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


def _join(parts: list[Part], slots: list[range | list[int]], size: int, pin_memory: bool) -> dict[str, torch.Tensor]:
    """The workers' parts of a batch in the order of the samples."""
    joined: dict[str, torch.Tensor] = {}
    for part, slot in zip(parts, slots, strict=True):
        for name, array in part.arrays.items():
            if name not in joined:
                joined[name] = torch.empty((size, *array.shape[1:]), dtype=_dtype(array.dtype), pin_memory=pin_memory)
            joined[name].numpy()[slice(slot.start, slot.stop, slot.step) if isinstance(slot, range) else slot] = array
    return joined


@lru_cache
def _dtype(dtype: np.dtype) -> torch.dtype:
    """uint8 stays: it is what images travel as."""
    return torch.from_numpy(np.empty(0, np.int64 if np.issubdtype(dtype, np.signedinteger) else dtype)).dtype
