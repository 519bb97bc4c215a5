"""Any collection of shards, each of which can be read from its beginning, as the data of a run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.samples import MakeSample, SampleMaker, check_repeatable, content_of
from genscale.errors import UserError
from genscale.rng import permutation

LANES = (48, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""Numbers of lanes that many numbers of processes divide; the largest is taken that there are shards for."""
PROBES = 8
"""Shards whose first sample is read to tell a collection from another."""
EMPTY_EPOCHS = 1000
"""Epochs after each other in which a lane may be dealt nothing but empty shards, by chance."""


class ShardData(Data):
    """Shards of samples (files, parts of a stream) as the data of a run: same samples at any number of processes, exact resume.

    In every epoch the shards are dealt to lanes by a permutation; a lane reads its shards one after the other, and shuffles
    within windows of samples. A resume opens one shard a lane, and reads on from its place in it. A lane begins its next epoch
    when it has read its shards, so lanes may be in different epochs where shards differ in length; each sample comes once in
    each epoch of its lane.

    Args:
        shards: paths, addresses, or iterables that can be read again and again (not generators). Of a stream of Hugging Face:
            `[stream.shard(num_shards=n, index=i) for i in range(n)]`, with n its `num_shards`.
        validation: the items to validate with; all of them are read.
        seed: keys the order; the run's.
        read: opens a shard: its items in a fixed order. Default: iterates it.
        sample: turns an item into named arrays, where it is not a mapping of numbers, a pair or an array already.
        lanes: streams that make up the order, at most as many as shards (default: the largest of 48, 24, 16, 12, ... that is).
        window: samples of a lane that are shuffled among each other, and held in memory (1: as they lie).

    Raises:
        UserError: fewer shards than lanes, or nothing to validate with.

    Example:
        >>> from genscale.data.shard_data import ShardData
        >>> data = ShardData([range(0, 5), range(10, 15)], validation=range(90, 95), seed=1)
        >>> data.lane_count, len(data.validation())
        (2, 5)
    """

    def __init__(self, shards: Sequence[Any], *, validation: Iterable[Any], seed: int,
                 read: Callable[[Any], Iterable[Any]] = iter, sample: MakeSample | None = None, lanes: int | None = None,
                 window: int = 256) -> None:
        self._shards, self._seed, self._read, self._window = list(shards), seed, read, max(1, window)
        self._held_out, self._sample = list(validation), SampleMaker(sample)
        count = len(self._shards)
        if not count or not self._held_out:
            what = "items to validate with" if count else "shards"
            raise UserError(f"data: there are no {what}; give at least one")
        self.lane_count = lanes or next(number for number in LANES if number <= count)
        if self.lane_count > count:
            raise UserError(f"data: {self.lane_count} lanes need as many shards, and there are {count}; set lanes to {count} "
                            "at most, or make more shards")

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """See `Data.open_lane`."""
        epoch, first, window, done = (cursor[key] for key in ("epoch", "turn", "window", "at")) if cursor else (0, 0, 0, 0)
        empty = 0
        while empty < EMPTY_EPOCHS:
            dealt = permutation(len(self._shards), self._seed, "shards", epoch)[lane :: self.lane_count]
            empty += 1
            for turn in range(first, len(dealt)):
                number = int(dealt[turn])
                items = iter(islice(self._open(self._shards[number]), window * self._window, None))
                while held := list(islice(items, self._window)):
                    order = permutation(len(held), self._seed, "window", epoch, number, window)
                    for at in range(done, len(held)):
                        empty = 0
                        yield (self._sample(held[order[at]]),
                               {"epoch": epoch, "turn": turn, "window": window, "at": at + 1})
                    window, done = window + 1, 0
                window = done = 0
            epoch, first = epoch + 1, 0
        raise UserError(f"data: lane {lane} was dealt nothing but empty shards in {EMPTY_EPOCHS} epochs; leave these out")

    def _open(self, shard: Any) -> Iterable[Any]:
        """The items of a shard. A stream of Hugging Face keeps in itself where it is read, so that two who begin at a time move
        each other on: each has one of its own."""
        if (library := sys.modules.get("datasets")) and isinstance(shard, library.IterableDataset):
            shard = shard.shard(num_shards=1, index=0)
        return self._read(shard)

    def validation(self) -> list[Sample]:
        """The validation samples, in their order."""
        return [self._sample(item) for item in self._held_out]

    def check(self, global_batch_size: int) -> None:
        """Raises UserError where there is less than one global batch, or a shard is another one whenever it is read."""
        if self._read is iter and iter(self._shards[0]) is self._shards[0]:
            raise UserError("data: a shard can be read only once (it is an iterator); give shards that can be read again, or a "
                            "`read` that opens one")
        found = 0
        for shard in self._shards:
            found += sum(1 for _ in islice(self._open(shard), global_batch_size - found))
            if found >= global_batch_size:
                break
        else:
            raise UserError(f"train.global_batch_size: {global_batch_size} is more than the {found} samples of all shards; "
                            f"nearest allowed: {found}")
        check_repeatable(lambda: next(self._firsts()), "a shard")

    def _firsts(self) -> Iterator[Sample]:
        """The first samples of shards, of those that have one."""
        for shard in self._shards:
            yield from (self._sample(item) for item in islice(self._open(shard), 1))

    @cached_property
    def _content(self) -> str:
        return content_of(islice(self._firsts(), PROBES))

    def plan(self) -> dict[str, Any]:
        """See `Data.plan`."""
        plan = {"order": "shards", "shards": len(self._shards), "lanes": self.lane_count, "window": self._window,
                "seed": self._seed, "content": self._content}
        if all(isinstance(shard, (str, Path)) for shard in self._shards):
            names = "\n".join(Path(shard).name for shard in self._shards)  # where they lie is not what they are
            plan["names"] = hashlib.sha256(names.encode()).hexdigest()[:16]
        return plan

    def close(self) -> None:
        """Nothing is open but what is being read."""
