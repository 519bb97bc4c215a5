"""The global order: which sample belongs to which rank and worker, and reading lanes so that each sample comes once.

Global batch k is the samples [k G, (k + 1) G). Rank r of R takes the samples that are r modulo R; its workers deal out these,
or the lanes they live in. Nothing else depends on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from genscale.data.lanes import Data, Sample
from genscale.data.retrying import retries

DIGEST_MODULUS = 2**61
"""Ledger sums are taken modulo this: it divides 2**64, so that an int64 all-reduce that wraps around still adds up right."""

Cursors = dict[str, dict[str, Any]]
"""Lane (a string, as JSON has it) -> {"position": samples read, "cursor": the data's own}."""


@dataclass(frozen=True)
class Share:
    """What one rank reads of each global batch.

    Attributes:
        lanes: of data whose lanes must be read from the start: each is then read by one worker of the rank alone. None: samples
            can be stepped over for nothing, and are dealt out one by one.
    """

    global_batch_size: int
    rank: int
    world_size: int
    workers: int
    lanes: int | None = None

    @property
    def period(self) -> int:
        """The rank's own samples after which its next is of the same lane again: so many lanes it reads."""
        return 1 if self.lanes is None else self.lanes // math.gcd(self.lanes, self.world_size)

    def samples(self, batch: int, worker: int) -> list[int]:
        """Global samples of a global batch for one worker of this rank, increasing."""
        first = batch * self.global_batch_size + self.rank
        return [first + slot * self.world_size for slot in self.slots(batch, worker)]

    def slots(self, batch: int, worker: int) -> range | list[int]:
        """Where those samples stand among the rank's own of that batch."""
        own = self.global_batch_size // self.world_size
        if self.lanes is None or self.period % self.workers == 0:
            return range((worker - batch * own) % self.workers, own, self.workers)
        return [slot for slot in range(own) if (batch * own + slot) % self.period % self.workers == worker]


def times_read(lanes: int, world_size: int) -> int:
    """How many ranks read each lane, where they share it: so often the work of reading it is done."""
    return world_size // math.gcd(lanes, world_size)


@dataclass
class Part:
    """One worker's samples of one global batch.

    Attributes:
        arrays: each `(samples, ...)`; empty when the worker has no sample in this batch.
        digest: sum of the samples' fingerprints.
        cursors: the lanes that were read, as they stand after this batch.
        retries: requests to web servers that were repeated for it, about: others of the process may have gone on meanwhile.
    """

    arrays: dict[str, np.ndarray]
    digest: int
    cursors: Cursors = field(default_factory=dict)
    retries: int = 0


def fingerprint(g: int, sample: Sample) -> int:
    """64 bits of a sample's number and content (XXH3: forty times as fast as a cryptographic hash, and nobody attacks it)."""
    content: list[Any] = []
    for name in sorted(sample) if len(sample) > 1 else sample:
        array = np.ascontiguousarray(sample[name])
        content += _header(name, array.dtype, array.shape), array.data
    return xxhash.xxh3_64_intdigest(b"".join(content), seed=g)


@lru_cache(maxsize=1024)
def _header(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{name} {dtype.str} {shape}".encode()


class LaneReader:
    """Global samples by number, in increasing order; a lane's samples that belong to others are stepped over, or read."""

    def __init__(self, data: Data, cursors: Cursors) -> None:
        self._data, self._start = data, cursors
        self._lanes: dict[int, Iterator[tuple[Sample, Any]]] = {}
        self._positions: dict[int, int] = {}

    def read(self, g: int) -> tuple[Sample, str, dict[str, Any]]:
        """(sample, lane, the lane's entry in `Cursors` right after it)."""
        position, lane = divmod(g, self._data.lane_count)
        if lane not in self._lanes:
            start = self._start.get(str(lane), {"position": 0, "cursor": None})
            self._lanes[lane] = self._data.open_lane(lane, start["cursor"])
            self._positions[lane] = start["position"]
        at = self._positions[lane]
        if at > position:
            raise RuntimeError(f"lane {lane} was read to {at}, past sample {g} at {position}")
        skipped = self._data.cursor_at(position) if at < position else None
        if skipped is not None:
            self._lanes[lane], at = self._data.open_lane(lane, skipped), position
        samples = self._lanes[lane]
        for _ in range(at, position + 1):
            sample, cursor = next(samples)
        self._positions[lane] = position + 1
        return sample, str(lane), {"position": position + 1, "cursor": cursor}


def read_parts(data: Data, share: Share, worker: int, batch: int, cursors: Cursors,
               stopped: Callable[[], bool] = lambda: False) -> Iterator[Part]:
    """One worker's part of every global batch from `batch` on, without end."""
    reader = LaneReader(data, cursors)
    while True:
        samples: list[Sample] = []
        part = Part({}, 0)
        for g in share.samples(batch, worker):
            if stopped():
                return
            sample, lane, cursor = reader.read(g)
            samples.append(sample)
            part.digest += fingerprint(g, sample)
            part.cursors[lane] = cursor
        part.digest %= DIGEST_MODULUS
        part.retries = retries.take()
        if samples:
            part.arrays = {name: np.array([sample[name] for sample in samples]) for name in samples[0]}
        yield part
        batch += 1


def furthest(into: Cursors, other: Cursors) -> None:
    """Move each lane of `into` on to where `other` has it, if that is further."""
    for lane, entry in other.items():
        if lane not in into or entry["position"] > into[lane]["position"]:
            into[lane] = entry


def merge_states(states: list[dict[str, Any]], lane_count: int) -> dict[str, Any]:
    """The data position of all ranks together, for any number of ranks to continue from.

    Args:
        states: `StepLoader.state()` of every rank after the same global batch.
        lane_count: lanes of the data.

    Raises:
        ValueError: the ranks stand at different batches, or a lane is none of the data's.
    """
    batches = {state["batches"] for state in states}
    if len(batches) != 1:
        raise ValueError(f"the ranks' data positions are of different global batches: {sorted(batches)}")
    cursors: Cursors = {}
    for state in states:
        furthest(cursors, state["cursors"])
    if any(not 0 <= int(lane) < lane_count for lane in cursors):
        raise ValueError(f"the data position has lanes {sorted(cursors, key=int)}, the data {lane_count}")
    return {"batches": batches.pop(), "cursors": dict(sorted(cursors.items(), key=lambda item: int(item[0])))}
