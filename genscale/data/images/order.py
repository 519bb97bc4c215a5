"""The order of images that can be read by number: every epoch a permutation of all of them, dealt to the lanes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from genscale.data.images.reading import ImageReader, labelled
from genscale.data.images.sets import ImageSet
from genscale.data.lanes import Cursor, Sample
from genscale.rng import numpy_generator, permutation


class ShuffledImages:
    """Endless lanes over some images of a set.

    Global sample g is image `permutation(seed, epoch)[g % n]` of epoch `g // n`, so that every epoch has each image once,
    wherever it ends in the global batches. A cursor is the number of samples that were read.

    Args:
        images, indices: the set, and which of its images.
        reader: decodes them.
        draws: uniform numbers that an image needs for its augmentation.
        labelled: samples have labels.
        identity: what tells the set from others, as JSON.
    """

    def __init__(self, images: ImageSet, indices: np.ndarray, reader: ImageReader, *, seed: int, lanes: int, draws: int,
                 labelled: bool, identity: dict[str, Any]) -> None:
        self._images, self._indices, self.reader = images, indices, reader
        self._seed, self._lanes, self._draws, self._labelled = seed, lanes, draws, labelled
        self._identity = identity
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._bad: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    @property
    def count(self) -> int | None:
        """The number of images, where it is known."""
        return len(self._indices)

    def class_counts(self) -> np.ndarray | None:
        """`(classes,)` images of each class, where that is known."""
        labels, classes = self._images.labels, self._images.classes
        return None if labels is None or classes is None else np.bincount(labels[self._indices], minlength=len(classes))

    def at_least(self, count: int) -> int:
        """The number of images, counted up to `count`."""
        return min(count, len(self._indices))

    def plan(self) -> dict[str, Any]:
        """What the order depends on."""
        return {"order": "images", **self._identity, "trained_on": len(self._indices)}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The epoch's permutation, and the numbers drawn for each image."""
        found = self._epochs.get(epoch)
        if found is None:
            count = len(self._indices)
            order = permutation(count, self._seed, "images", epoch)
            draws = None
            if self._draws:
                draws = numpy_generator(self._seed, "augment", epoch).random((count, self._draws), np.float32)
            # Lanes are in step: two epochs are all that are read at a time.
            found = order, draws
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """See `Data.open_lane`."""
        position, count = cursor["position"] if cursor else 0, len(self._indices)
        while True:
            epoch, at = divmod(position * self._lanes + lane, count)
            order, draws = self._epoch(epoch)
            number = int(order[at])
            position += 1
            yield self._sample(number, None if draws is None else draws[number]), {"position": position}

    def cursor_at(self, position: int) -> Cursor:
        """See `Data.cursor_at`."""
        return {"position": position}

    def _sample(self, number: int, draws: np.ndarray | None) -> Sample:
        """The image of this number, or the next one that is whole."""
        for step in range(len(self._indices)):
            chosen = (number + step) % len(self._indices)
            index = int(self._indices[chosen])
            pixels = None
            if chosen not in self._bad:
                pixels = self.reader.sample(partial(self._images.read, index), self._images.name(index), draws, keep=chosen)
            if step == 0:
                self.reader.count(self._images.name(index) if pixels is None else None)
            if pixels is None:
                self._bad.add(chosen)
                continue
            labels = self._images.labels if self._labelled else None
            return {"image": pixels} if labels is None else labelled(pixels, labels[index])
        raise self.reader.nothing_whole()
