"""A source that fits in memory: shuffled as a whole, laid end to end, and cut into lanes of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from genscale.data.packing import PIECE, Place, cut
from genscale.data.readers import Spec
from genscale.data.windows import Catalogue, Part, Source, Window
from genscale.errors import UserError
from genscale.rng import permutation

PIECES_OF_A_LANE = 64
"""From so many pieces in a lane on, lanes begin at a piece: a piece divided by a lane can be in no cache."""
PART = 2**20
"""Bytes that a process takes at a time where a source is swept."""
EMPTY_EPOCHS = 1000
"""Epochs after each other in which a lane may get no document, by chance."""
HASHES = 2**64
"""Values of `text_hash`: a document is held out where its hash is below this times the fraction, whatever else is read."""


def text_hash(text: str) -> int:
    """64 bits of the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class MemorySource(Source):
    """All documents in memory: permuted by (seed, epoch), laid end to end and cut into lanes of equal length.

    Cutting by length and not by number keeps the lanes in step (documents differ a hundredfold in length); at most
    `lanes - 1` documents of an epoch continue in the next lane. For the cache it is one shard; a row is a training document.

    Args:
        texts: the documents in canonical order.
        fraction: share of the documents to hold out, on average.
        spec, seed, lanes: the source's name for messages, the key of the order, the number of lanes.
        alone: hold out at least one document when `fraction` is above 0. Not in a mixture, whose other sources may train on it.

    Raises:
        UserError: nothing is left to train on, or too little for so many lanes.
    """

    def __init__(self, texts: Sequence[str], fraction: float, spec: Spec, seed: int, lanes: int, alone: bool = True) -> None:
        self._seed, self._lanes, self._fraction, self._spec = seed, lanes, fraction, spec
        self._whole = spec.pairs  # a pair is not cut from its mask
        hashes = np.fromiter((text_hash(text) for text in texts), np.uint64, len(texts))
        self._digest = hashlib.sha256(hashes.tobytes()).hexdigest()
        # A threshold and not a rank, the same for every source: no text is held out of one and trained on in another.
        held = hashes < np.uint64(int(fraction * HASHES))
        if fraction > 0 and alone and held.all():
            held = hashes < hashes.max()
        elif fraction > 0 and alone and not held.any():
            held = hashes == hashes.min()
        if held.all():
            kind = "conversation(s)" if spec.pairs else "document(s)"
            alike = ", all alike," if len(texts) > 1 == len(set(texts)) else ""  # equal ones stay on one side
            smaller = "" if spec.pairs else ", or a smaller data.document"
            raise UserError(f"{spec.key}={spec.name}: its {len(texts)} {kind}{alike} do not divide into a training and a "
                            f"validation set; set data.validation_source{smaller}")
        self._held_out = [text for text, out in zip(texts, held, strict=True) if out]
        # One buffer, so that neither forked processes nor the garbage collector touch millions of strings.
        training = [text.encode() for text, out in zip(texts, held, strict=True) if not out]
        self._lengths = np.fromiter(map(len, training), np.int64, len(training))
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._buffer = b"".join(training)
        # Four bytes are at least one character.
        if len(self._buffer) < 4 * lanes:
            raise UserError(f"data.lanes={lanes}: the training set of {spec.key}={spec.name} has only {len(self._buffer)} "
                            f"bytes of text; set data.lanes to {max(1, len(self._buffer) // 4)} at most")
        if self._whole and len(training) < lanes:
            raise UserError(f"data.lanes={lanes}: the training set of {spec.key}={spec.name} has only {len(training)} pairs, "
                            f"which are not cut; set data.lanes to {len(training)} at most")
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pieces: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}, "_pieces": {}}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the documents, and where each ends in the permuted text."""
        if epoch not in self._orders:
            order = permutation(len(self._lengths), self._seed, "documents", epoch)
            # Lanes are in step: two epochs are all that are read at a time.
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: (order, np.cumsum(self._lengths[order]))}
        return self._orders[epoch]

    def _text(self, document: int) -> str:
        start = int(self._starts[document])
        return self._buffer[start : start + int(self._lengths[document])].decode()

    def _boundary(self, epoch: int, lane: int) -> tuple[int, int]:
        """(index in the permutation, byte in that document) where the lane's share of the epoch begins."""
        order, ends = self._order(epoch)
        target = lane * len(self._buffer) // self._lanes
        index = int(np.searchsorted(ends, target, side="right"))
        if index == len(order):
            return index, 0
        document = int(order[index])
        length, start = int(self._lengths[document]), int(self._starts[document])
        byte = target - (int(ends[index]) - length)
        if self._whole:
            return index + (byte > 0), 0
        if len(self._buffer) >= PIECES_OF_A_LANE * PIECE * self._lanes:
            byte = self._next_piece(document, byte)
        while byte < length and self._buffer[start + byte] & 0xC0 == 0x80:  # inside a UTF-8 character
            byte += 1
        return (index + 1, 0) if byte == length else (index, byte)

    def _next_piece(self, document: int, byte: int) -> int:
        """Where the first piece of the document from there on begins, or the document ends."""
        if byte == 0 or self._lengths[document] <= PIECE:  # a character is at least a byte: one piece
            return int(self._lengths[document]) if byte else 0
        if document not in self._pieces:
            self._pieces[document] = np.cumsum([len(piece.encode()) for piece in cut(self._text(document))])
        ends = self._pieces[document]
        return int(ends[np.searchsorted(ends, byte)])

    def windows(self, lane: int, place: Place | None = None, catalogue: Catalogue | None = None) -> Iterator[Window]:
        place = place or {"epoch": 0, "document": 0, "piece": 0}
        epoch, start, empty = place["epoch"], (place["document"], place["piece"]), 0
        while True:
            if catalogue:
                catalogue(Part(0, 0, 1))  # a look at what was written in the epoch before
            order = self._order(epoch)[0]
            (first, begin), (last, end) = self._boundary(epoch, lane), self._boundary(epoch, lane + 1)
            rows = order[first : last + (end > 0)]
            empty = 0 if len(rows) else empty + 1
            if empty == EMPTY_EPOCHS:  # one pair is longer than several lanes
                raise UserError(f"data.lanes={self._lanes}: lane {lane} of {self._spec.key}={self._spec.name} gets none of the "
                                f"{len(order)} pairs in {empty} epochs, so unequal are their lengths; set fewer data.lanes, or "
                                "data.max_characters")
            limits = {}
            if begin:
                limits[0] = (begin, int(self._lengths[rows[0]]))
            if end:
                limits[last - first] = (begin if first == last else 0, end)
            yield self._window(rows, start, limits, epoch)
            epoch, start = epoch + 1, (0, 0)

    def _window(self, rows: np.ndarray, start: tuple[int, int], limits: dict[int, tuple[int, int]], epoch: int) -> Window:
        return Window(shards=np.zeros(len(rows), np.int64), rows=rows, text=lambda n: self._text(rows[n]), start=start,
                      limits=limits, place=lambda n, piece: {"epoch": epoch, "document": n, "piece": piece})

    def parts(self, processes: int) -> list[tuple[Part, int]]:
        count = min(len(self._lengths), max(len(self._buffer) // PART, 4 * processes))
        return [(Part(0, residue, count), int(self._lengths[residue::count].sum())) for residue in range(count)]

    def sweep(self, part: Part, catalogue: Catalogue | None = None) -> Iterator[Window]:
        window = self._window(np.arange(part.residue, len(self._lengths), part.modulus), (0, 0), {}, 0)
        yield window
        yield Window(np.empty(0, np.int64), np.empty(0, np.int64), window.text, window.place,
                     finished=[(part, len(window.rows))])

    def sizes(self) -> list[int]:
        return [len(self._buffer)]

    def documents(self) -> Iterator[str]:
        return map(self._text, range(len(self._lengths)))

    def held_out(self) -> Iterator[str]:
        return iter(self._held_out)

    def plan(self) -> dict[str, Any]:
        return {"order": "memory", "documents": len(self._lengths), "bytes": len(self._buffer), "content": self._digest}

    def identity(self) -> dict[str, Any]:
        return {**self.plan(), "validation_fraction": self._fraction}
