"""Any data set that can be read by number as the data of a run: every epoch a permutation of it, dealt to lanes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.samples import MakeSample, SampleMaker, check_repeatable, content_of
from genscale.errors import UserError
from genscale.rng import permutation

PROBES = 64
"""Samples by which a data set is told from another of the same length."""


class MapDataset(Protocol):
    """What torch calls a map-style data set; those of Hugging Face are ones too, and lists."""

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """An item, the same whenever it is read."""


class MapData(Data):
    """A map-style data set as the data of a run: same samples at any number of processes, exact resume.

    Global sample g is item `permutation(seed, epoch)[g % n]` of epoch `g // n`: every epoch has each item once, wherever it
    ends in the global batches. A data set that changes between two lives of a run is refused (its length, 64 items of it, and
    its `fingerprint` where it has such an attribute).

    Args:
        dataset: has `len(dataset)` and `dataset[index]`: torch's, Hugging Face's (`datasets.Dataset`), a list, a tensor.
        validation: another such data set; or how many of this one's items are held out (the same ones whatever the seed).
        seed: keys the order; the run's.
        sample: turns an item into named arrays, where it is not a mapping of numbers, a pair or an array already.
        lanes: streams that make up the order; more than processes x workers, and a multiple of them, is best.

    Raises:
        UserError: nothing is left to train on, or nothing to validate with.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from genscale.data.map_data import MapData
        >>> pairs = TensorDataset(torch.arange(100.0), torch.arange(100))
        >>> data = MapData(pairs, validation=20, seed=1)
        >>> data.samples_of_epoch(), len(data.validation()), sorted(data.validation()[0])
        (80, 20, ['x', 'y'])
    """

    def __init__(self, dataset: MapDataset, *, validation: MapDataset | int, seed: int, sample: MakeSample | None = None,
                 lanes: int = 48) -> None:
        self._dataset, self._seed, self.lane_count = dataset, seed, lanes
        self._sample = SampleMaker(sample)
        count = len(dataset)
        held_out = validation if isinstance(validation, int) else 0
        if count - held_out < 1 or held_out < 0:
            raise UserError(f"data: validation={held_out} of a data set of {count} items leaves none to train on; nearest "
                            f"allowed: {max(0, count - 1) if held_out > 0 else 1}")
        # Not keyed by the run's seed: runs of several seeds are judged on the same samples.
        order = permutation(count, 0, "held out")
        self._held_out, self._indices = np.sort(order[:held_out]), np.sort(order[held_out:])
        self._validation: MapDataset = dataset if isinstance(validation, int) else validation
        if not isinstance(validation, int):
            self._held_out = np.arange(len(validation))
        if not len(self._held_out):
            raise UserError("data: there is nothing to validate with; give `validation` a data set, or a number of items")
        self._orders: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Lanes are in step: two epochs are all that are read at a time.
            kept = dict(list(self._orders.items())[-1:])
            self._orders = {**kept, epoch: permutation(len(self._indices), self._seed, "items", epoch)}
        return self._orders[epoch]

    def _read(self, index: int) -> Sample:
        return self._sample(self._dataset[index])

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """See `Data.open_lane`."""
        position, count = cursor["position"] if cursor else 0, len(self._indices)
        while True:
            epoch, at = divmod(position * self.lane_count + lane, count)
            position += 1
            yield self._read(int(self._indices[self._order(epoch)[at]])), {"position": position}

    def cursor_at(self, position: int) -> Cursor:
        """See `Data.cursor_at`."""
        return {"position": position}

    def samples_of_epoch(self) -> int:
        """The number of items to train on."""
        return len(self._indices)

    def validation(self) -> list[Sample]:
        """The validation samples, in the order of their data set."""
        return [self._sample(self._validation[int(index)]) for index in self._held_out]

    def check(self, global_batch_size: int) -> None:
        """Raises UserError where there is less than one global batch, or an item is another one whenever it is read."""
        if len(self._indices) < global_batch_size:
            raise UserError(f"train.global_batch_size: {global_batch_size} is more than the {len(self._indices)} samples to "
                            f"train on; nearest allowed: {len(self._indices)}")
        check_repeatable(lambda: self._read(int(self._indices[0])), "an item of the data set")

    @cached_property
    def _content(self) -> str:
        probes = permutation(len(self._indices), 0, "probes")[:PROBES]
        return content_of(self._read(int(self._indices[probe])) for probe in probes)

    def plan(self) -> dict[str, Any]:
        """See `Data.plan`."""
        plan = {"order": "items", "items": len(self._indices), "lanes": self.lane_count, "seed": self._seed,
                "content": self._content,
                "validation_items": len(self._held_out)}
        name = getattr(self._dataset, "fingerprint", None)
        return {**plan, "fingerprint": name} if isinstance(name, str) else plan

    def close(self) -> None:
        """Nothing is open."""
