"""Which document goes to which lane, in which order: a pure function of (seed, epoch, lane).

A source that fits in memory is shuffled perfectly and cut into lanes of equal length; a larger one is streamed: its shards are
dealt to the lanes and shuffled in windows. The held-out documents are chosen by a hash of their text, so that training
and validation never overlap, whatever the seed or the shape, and equal documents stay on one side.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from genscale.data.packing import Piece, Place, cut
from genscale.data.readers import Shard, Spec, find_shards, known_size
from genscale.errors import UserError
from genscale.rng import permutation

MEMORY_LIMIT = 256 * 2**20
"""Bytes of text up to which a source is held in memory."""
HASHES = 2**64


def text_hash(text: str) -> int:
    """64 bits of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Source(ABC):
    """A training stream in lanes, and the documents held out of it."""

    @abstractmethod
    def read(self, lane: int, place: Place | None = None) -> Iterator[Piece]:
        """Endless pieces of a lane's documents, epoch after epoch; from the start, or from the place of a piece."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The training documents in canonical order, once."""

    @abstractmethod
    def held_out(self) -> Iterator[str]:
        """The held-out documents in canonical order, once."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the documents and their order depend on, as JSON."""


class MemorySource(Source):
    """All documents in memory: permuted by (seed, epoch), laid end to end and cut into lanes of equal length.

    Cutting by length and not by number keeps the lanes in step (documents differ a hundredfold in length); at most
    `lanes - 1` documents of an epoch continue in the next lane.

    Args:
        texts: the documents in canonical order.
        fraction: share of the documents to hold out; at least one when above 0.
        spec, seed, lanes: the source's name for messages, the key of the order, the number of lanes.

    Raises:
        UserError: nothing is left to train on, or too little for so many lanes.
    """

    def __init__(self, texts: Sequence[str], fraction: float, spec: Spec, seed: int, lanes: int) -> None:
        self._seed, self._lanes = seed, lanes
        hashes = np.fromiter((text_hash(text) for text in texts), np.uint64, len(texts))
        self._digest = hashlib.sha256(hashes.tobytes()).hexdigest()
        held = np.zeros(len(texts), bool)
        if fraction > 0:
            # A rank and not a threshold: the share is kept also where documents are few.
            count = max(1, round(fraction * len(texts)))
            held = hashes <= np.partition(hashes, count - 1)[count - 1]
        if held.all():
            raise UserError(f"data.source={spec.name}: its {len(texts)} document(s) do not divide into a training and a "
                            "validation set; set data.validation_source, or a smaller data.document")
        self._held_out = [text for text, out in zip(texts, held, strict=True) if out]
        # One buffer, so that neither forked processes nor the garbage collector touch millions of strings.
        training = [text.encode() for text, out in zip(texts, held, strict=True) if not out]
        self._lengths = np.fromiter(map(len, training), np.int64, len(training))
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._buffer = b"".join(training)
        # Four bytes are at least one character.
        if len(self._buffer) < 4 * lanes:
            raise UserError(f"data.lanes={lanes}: the training set of data.source={spec.name} has only {len(self._buffer)} "
                            f"bytes of text; set data.lanes to {max(1, len(self._buffer) // 4)} at most")
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the documents, and where each ends in the permuted text."""
        if epoch not in self._orders:
            order = permutation(len(self._lengths), self._seed, "documents", epoch)
            # Lanes are in step: two epochs are all that are read at a time.
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: (order, np.cumsum(self._lengths[order]))}
        return self._orders[epoch]

    def _boundary(self, epoch: int, lane: int) -> tuple[int, int]:
        """(index in the permutation, byte in that document) where the lane's share of the epoch begins."""
        order, ends = self._order(epoch)
        target = lane * len(self._buffer) // self._lanes
        index = int(np.searchsorted(ends, target, side="right"))
        if index == len(order):
            return index, 0
        length, start = int(self._lengths[order[index]]), int(self._starts[order[index]])
        byte = target - (int(ends[index]) - length)
        while byte < length and self._buffer[start + byte] & 0xC0 == 0x80:  # inside a UTF-8 character
            byte += 1
        return (index + 1, 0) if byte == length else (index, byte)

    def read(self, lane: int, place: Place | None = None) -> Iterator[Piece]:
        place = place or {"epoch": 0, "document": 0, "piece": 0}
        epoch, skip, first_piece = place["epoch"], place["document"], place["piece"]
        while True:
            order = self._order(epoch)[0]
            (first, begin), (last, end) = self._boundary(epoch, lane), self._boundary(epoch, lane + 1)
            for index in range(first + skip, last + (end > 0)):
                document = order[index]
                start, length = int(self._starts[document]), int(self._lengths[document])
                stop = end if index == last else length
                texts = cut(self._buffer[start + (begin if index == first else 0) : start + stop].decode())
                for number in range(first_piece, len(texts)):
                    yield Piece(texts[number], number == len(texts) - 1 and stop == length,
                                {"epoch": epoch, "document": index - first, "piece": number})
                first_piece = 0
            epoch, skip = epoch + 1, 0

    def documents(self) -> Iterator[str]:
        for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True):
            yield self._buffer[start : start + length].decode()

    def held_out(self) -> Iterator[str]:
        return iter(self._held_out)

    def plan(self) -> dict[str, Any]:
        return {"order": "memory", "documents": len(self._lengths), "bytes": len(self._buffer), "content": self._digest}


class StreamSource(Source):
    """Shards dealt to lanes by a permutation keyed (seed, epoch), their documents shuffled in windows.

    A window's permutation is keyed (seed, epoch, lane, window): there is nothing to save but where the window starts.

    Args:
        shards: what to read.
        fraction: share of the documents to hold out.
        window: documents shuffled together.
        spec, seed, lanes: the source's name for messages, the key of the order, the number of lanes.
    """

    def __init__(self, shards: Sequence[Shard], fraction: float, window: int, spec: Spec, seed: int, lanes: int) -> None:
        self._shards, self._window, self._spec, self._seed, self._lanes = list(shards), window, spec, seed, lanes
        self._threshold = int(fraction * HASHES)

    def _trains(self, text: str) -> bool:
        return not self._threshold or text_hash(text) >= self._threshold

    def share(self, lane: int, epoch: int) -> list[tuple[int, int, int]]:
        """(shard, residue, modulus) of what the lane reads in the epoch.

        Whole shards as far as they go round; the rest is cut into as many residues of rows as give every lane the same number.
        """
        count, lanes = len(self._shards), self._lanes
        order = permutation(count, self._seed, "shards", epoch).tolist()
        whole = count - count % lanes
        rest = order[whole:]
        cuts = lanes // math.gcd(len(rest), lanes)
        residues = [(shard, residue, cuts) for residue in range(cuts) for shard in rest]
        return [(shard, 0, 1) for shard in order[lane:whole:lanes]] + residues[lane::lanes]

    def _rows(self, lane: int, epoch: int, part: int, row: int) -> Iterator[tuple[int, int, str]]:
        """(part of the share, row in its shard, text) of the training documents from there on."""
        for number, (shard, residue, modulus) in enumerate(self.share(lane, epoch)[part:], part):
            for at, text in self._shards[shard].rows(row, residue, modulus):
                if self._trains(text):
                    yield number, at, text
            row = 0

    def read(self, lane: int, place: Place | None = None) -> Iterator[Piece]:
        place = place or {"epoch": 0, "part": 0, "row": 0, "window": 0, "document": 0, "piece": 0}
        empty = 0
        while True:
            rows = self._rows(lane, place["epoch"], place["part"], place["row"])
            number, skip, piece = place["window"], place["document"], place["piece"]
            while documents := list(islice(rows, self._window)):
                empty = 0
                part, row, _ = documents[0]
                order = permutation(len(documents), self._seed, "window", place["epoch"], lane, number)
                for index in range(skip, len(documents)):
                    texts = cut(documents[order[index]][2])
                    for at in range(piece, len(texts)):
                        yield Piece(texts[at], at == len(texts) - 1, {"epoch": place["epoch"], "part": part, "row": row,
                                                                      "window": number, "document": index, "piece": at})
                    piece = 0
                number, skip = number + 1, 0
            empty += number == 0
            if empty == 2:  # the shares of one epoch may miss a lane by chance
                raise UserError(f"data.lanes={self._lanes}: lane {lane} of data.source={self._spec.name} gets no document; "
                                "set fewer data.lanes, or a smaller data.document")
            place = {"epoch": place["epoch"] + 1, "part": 0, "row": 0, "window": 0, "document": 0, "piece": 0}

    def _all(self) -> Iterator[str]:
        return (text for shard in self._shards for _, text in shard.rows())

    def documents(self) -> Iterator[str]:
        return (text for text in self._all() if self._trains(text))

    def held_out(self) -> Iterator[str]:
        return (text for text in self._all() if not self._trains(text))

    def plan(self) -> dict[str, Any]:
        names = hashlib.sha256(repr([(shard.name, shard.size) for shard in self._shards]).encode()).hexdigest()
        return {"order": "stream", "shards": len(self._shards), "bytes": sum(shard.size for shard in self._shards),
                "content": names, "window": self._window}


def open_source(spec: Spec, *, fraction: float, window: int, seed: int, lanes: int) -> Source:
    """The training source of `spec`: in memory up to `MEMORY_LIMIT` bytes of text, else streamed.

    Raises:
        UserError: nothing to read, nothing in it, or too little of it.
    """
    shards = find_shards(spec, at_least=1)
    size = known_size(spec, shards)
    if size is not None and size <= MEMORY_LIMIT:
        texts = _load(shards)
        if texts is not None:
            if not texts:
                raise no_text(spec)
            return MemorySource(texts, fraction, spec, seed, lanes)
    source = StreamSource(find_shards(spec, at_least=lanes), fraction, window, spec, seed, lanes)
    if next(source.documents(), None) is None:
        raise no_text(spec)
    return source


def no_text(spec: Spec) -> UserError:
    """The error for a source without a document."""
    return UserError(f"{spec.key}={spec.name}: holds no text in column '{spec.column}'; give one with text, or python-docs")


def _load(shards: Sequence[Shard]) -> list[str] | None:
    """All documents in canonical order, or None where they exceed `MEMORY_LIMIT` (compressed files tell only when read)."""
    texts, size = [], 0
    for shard in shards:
        for _, text in shard.rows():
            texts.append(text)
            size += len(text)
            if size > MEMORY_LIMIT:
                return None
    return texts
