"""What torch's caching allocator on a GPU makes of a sequence of births and deaths: more than their sum, for it keeps what it
has, in pieces that may not fit.

A model of c10/cuda/CUDACachingAllocator: requests are rounded to 512 bytes; small ones (up to 1 MiB) live in segments of 2 MiB,
others in segments of 20 MiB, or of their own size rounded to 2 MiB from 10 MiB on; the smallest free block that fits is taken
and split; neighbours that are free are merged. With expandable segments there is one growing segment a pool.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

ROUND = 512
SMALL, SMALL_SEGMENT = 2**20, 2 * 2**20
LARGE_SEGMENT, LEAST_OWN = 20 * 2**20, 10 * 2**20
OWN_ROUND = 2 * 2**20


@dataclass(frozen=True)
class Replayed:
    """Peaks of what was asked for, and of what the allocator held for it, in bytes."""

    allocated: int
    reserved: int


class _Pool:
    """Free blocks `(size, segment, offset)` of small or of large requests."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small, self.expandable = small, expandable
        self.least = ROUND if small or expandable else SMALL + 1
        self.free: list[tuple[int, int, int]] = []
        self.starts: dict[tuple[int, int], int] = {}
        self.ends: dict[tuple[int, int], int] = {}
        self.segments, self.top = 0, 0

    def take(self, size: int) -> tuple[tuple[int, int, int], int]:
        """A block of at least this size, and how much was reserved for it."""
        grown = 0
        place = bisect.bisect_left(self.free, (size, -1, -1))
        if place == len(self.free):
            grown = self._grow(size)
            place = bisect.bisect_left(self.free, (size, -1, -1))
        found, segment, offset = self.free.pop(place)
        del self.starts[segment, offset], self.ends[segment, offset + found]
        if found - size >= self.least:
            self._add(found - size, segment, offset + size)
            found = size
        return (found, segment, offset), grown

    def _grow(self, size: int) -> int:
        if self.expandable:
            tail, unit = self.ends.get((0, self.top), 0), SMALL_SEGMENT if self.small else LARGE_SEGMENT
            grown = -(-(size - tail) // unit) * unit
            self.give((grown, 0, self.top))
            self.top += grown
            return grown
        grown = SMALL_SEGMENT if self.small else LARGE_SEGMENT if size < LEAST_OWN else -(-size // OWN_ROUND) * OWN_ROUND
        self._add(grown, self.segments, 0)
        self.segments += 1
        return grown

    def give(self, block: tuple[int, int, int]) -> None:
        """Back, joined with its free neighbours."""
        size, segment, offset = block
        if (behind := self.starts.get((segment, offset + size))) is not None:
            self._remove(behind, segment, offset + size)
            size += behind
        if (before := self.ends.get((segment, offset))) is not None:
            self._remove(before, segment, offset - before)
            size, offset = size + before, offset - before
        self._add(size, segment, offset)

    def _add(self, size: int, segment: int, offset: int) -> None:
        bisect.insort(self.free, (size, segment, offset))
        self.starts[segment, offset] = self.ends[segment, offset + size] = size

    def _remove(self, size: int, segment: int, offset: int) -> None:
        del self.free[bisect.bisect_left(self.free, (size, segment, offset))]
        del self.starts[segment, offset], self.ends[segment, offset + size]


def replay(events: Iterable[tuple[int, int]], expandable: bool = False) -> Replayed:
    """Give the allocator births and deaths in their order: (which, bytes), a death with negative bytes.

    Example:
        >>> replay([(1, 3 * 2**20), (1, -3 * 2**20), (2, 2**20)]).reserved == 22 * 2**20  # of both pools a segment
        True
    """
    pools = _Pool(True, expandable), _Pool(False, expandable)
    blocks: dict[int, tuple[_Pool, tuple[int, int, int]]] = {}
    allocated = reserved = most_allocated = most_reserved = 0
    for which, size in events:
        if size > 0:
            rounded = -(-size // ROUND) * ROUND
            pool = pools[rounded > SMALL]
            block, grown = pool.take(rounded)
            blocks[which] = pool, block
            allocated, reserved = allocated + block[0], reserved + grown
        elif which in blocks:
            pool, block = blocks.pop(which)
            pool.give(block)
            allocated -= block[0]
        most_allocated, most_reserved = max(most_allocated, allocated), max(most_reserved, reserved)
    return Replayed(most_allocated, most_reserved)
