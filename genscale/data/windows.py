"""What a lane reads, a window of documents at a time: which ones, in which order, and their text only where it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from genscale.data.packing import Piece, Place, cut


class Part(NamedTuple):
    """The rows of a shard that are `residue` modulo `modulus`."""

    shard: int
    residue: int
    modulus: int


class Stretch(NamedTuple):
    """A piece of a document as a lane reads it.

    Attributes:
        number: of the piece among the document's, counted whatever the lane.
        text: its characters.
        ends: whether the document ends here.
        whole: whether this is the whole piece; false where a lane begins or ends inside it.
        begins: whether the document begins here.
    """

    number: int
    text: str
    ends: bool
    whole: bool
    begins: bool


Catalogue = Callable[[Part], np.ndarray | None]
"""The training rows of a part, increasing, where they are known without reading it; None where they are not."""


@dataclass
class Window:
    """Documents in the order in which they are read.

    Attributes:
        shards, rows: int64 `(documents,)`, where each document stands in its source.
        text: the text of the n-th document; of an image stream, its `Record`.
        place: the place of (n-th document, piece).
        start: (document, piece) to begin with.
        limits: (first byte, stop) of the documents of which only a part is the lane's.
        finished: parts that were read from front to back before this window ended, with their number of training documents.
    """

    shards: np.ndarray
    rows: np.ndarray
    text: Callable[[int], Any]
    place: Callable[[int, int], Place]
    start: tuple[int, int] = (0, 0)
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    finished: list[tuple[Part, int]] = field(default_factory=list)

    def stretches(self, document: int) -> Iterator[Stretch]:
        """The pieces of a document that are the lane's, from `start` on."""
        first = self.start[1] if document == self.start[0] else 0
        texts = cut(self.text(document))
        if document not in self.limits:
            for number in range(first, len(texts)):
                yield Stretch(number, texts[number], number == len(texts) - 1, True, number == 0)
            return
        begin, stop = self.limits[document]
        at = 0
        for number, text in enumerate(texts):
            raw = text.encode()
            low, high = max(begin - at, 0), min(stop - at, len(raw))
            at += len(raw)
            if number >= first and low < high:
                whole = high - low == len(raw)
                ends = number == len(texts) - 1 and high == len(raw)
                yield Stretch(number, text if whole else raw[low:high].decode(), ends, whole, number == 0 and low == 0)


class Source(ABC):
    """A training stream in lanes, and the documents held out of it.

    Attributes:
        sizes_are_most: whether `sizes` counts text that filters or limits of length leave out.
    """

    sizes_are_most: bool = False

    @abstractmethod
    def windows(self, lane: int, place: Place | None = None, catalogue: Catalogue | None = None) -> Iterator[Window]:
        """Endless windows of a lane's documents, epoch after epoch; from the start, or from the place of a piece.

        Args:
            catalogue: asked before a part is opened; what it knows is not read.
        """

    @abstractmethod
    def parts(self, processes: int) -> list[tuple[Part, int]]:
        """The whole source in parts that so many processes can read beside each other, each with its bytes (0: unknown)."""

    @abstractmethod
    def sizes(self) -> list[int]:
        """Bytes of text in each shard, about; 0 where unknown."""

    @abstractmethod
    def sweep(self, part: Part, catalogue: Catalogue | None = None) -> Iterator[Window]:
        """The training documents of a part in canonical order, once."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The training documents in canonical order, once."""

    @abstractmethod
    def held_out(self) -> Iterator[str]:
        """The held-out documents in canonical order, once."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the documents and their order depend on, as JSON."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What (shard, row) -> text depends on, as JSON: equal identities mean equal training documents under equal numbers."""

    def files(self) -> list[tuple[str, str]]:
        """(name, path) of the local files whose content `identity` does not tell in full."""
        return []

    def read(self, lane: int, place: Place | None = None) -> Iterator[Piece]:
        """Endless pieces of a lane's documents, epoch after epoch; from the start, or from the place of a piece."""
        for window in self.windows(lane, place):
            for document in range(window.start[0], len(window.rows)):
                for stretch in window.stretches(document):
                    yield Piece(stretch.text, stretch.ends, window.place(document, stretch.number), stretch.begins)
