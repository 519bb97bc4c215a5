"""Images of a source of any size: its shards are dealt to the lanes, and shuffled in windows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from genscale.data.images.labels import Classes
from genscale.data.images.reading import ImageReader, labelled
from genscale.data.images.sets import content_hash
from genscale.data.images.spec import Record
from genscale.data.lanes import Cursor, Sample
from genscale.data.readers import place
from genscale.data.stream_source import StreamSource
from genscale.data.windows import Window
from genscale.rng import numpy_generator

PROBED = 16
"""Shards that held-out images are looked for in."""


class ImageStream(StreamSource):
    """Records in lanes; those whose content hashes low are held out."""

    unit, advice = "image", "fewer data.lanes"

    @property
    def fraction(self) -> float:
        """Share that is held out."""
        return self._fraction

    @property
    def places(self) -> list[Any]:
        """See `ImageSet.places`."""
        return list(map(place, self._shards))

    def _trains(self, record: Record) -> bool:
        return not self._threshold or content_hash(record.content) >= self._threshold

    def sample_held_out(self, count: int) -> list[Record]:
        """Held-out records of the beginnings of some shards, at most `count`."""
        shards = self._shards[:: -(-len(self._shards) // PROBED)]
        share = -(-count // len(shards))
        found = [list(islice((record for _, record, _ in shard.rows() if not self._trains(record)), share)) for shard in shards]
        return [record for records in found for record in records][:count]


class StreamedImages:
    """Endless lanes of samples. A cursor is the place of the next image in its window.

    Args:
        classes: None where samples have no labels.
        draws: uniform numbers that an image needs for its augmentation.
    """

    def __init__(self, stream: ImageStream, reader: ImageReader, classes: Classes | None, seed: int, draws: int) -> None:
        self._stream, self.reader, self._classes, self._seed, self._draws = stream, reader, classes, seed, draws

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """See `Data.open_lane`."""
        for window in self._stream.windows(lane, cursor):
            for number in range(window.start[0], len(window.rows)):
                yield self._sample(window, number), window.place(number + 1, 0)

    def cursor_at(self, position: int) -> None:
        """See `Data.cursor_at`: which windows come before depends on what is in the files."""

    def _sample(self, window: Window, number: int) -> Sample:
        """An image of the window, or the next one in it that is whole."""
        draws = None
        if self._draws:
            address = window.place(number, 0)["epoch"], int(window.shards[number]), int(window.rows[number])
            draws = numpy_generator(self._seed, "augment", *address).random(self._draws, np.float32)
        count = len(window.rows)
        for step in range(count):
            record: Record = window.text((number + step) % count)
            pixels = self.reader.sample(partial(getattr, record, "content"), record.name, draws)
            if step == 0:
                self.reader.count(record.name if pixels is None else None)
            if pixels is not None:
                return labelled(pixels, self._classes.number(record.label, record.name)) if self._classes else {"image": pixels}
        raise self.reader.nothing_whole()

    @property
    def count(self) -> int | None:
        """The number of images: not known."""
        return None

    def class_counts(self) -> np.ndarray | None:
        """Images of each class: not known."""
        return None

    def at_least(self, count: int) -> int:
        """The number of images, counted up to `count`."""
        return sum(1 for _ in islice(self._stream.documents(), count))

    def plan(self) -> dict[str, Any]:
        """What the order depends on."""
        return {**self._stream.plan(), "files": self._stream.identity()["files"],
                "classes": self._classes.names if self._classes else None}
