"""Packing documents end to end into blocks, each with the place in the documents where the next block starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from genscale.data.text.tokenizers import Tokenizer, encode_pieces

PIECE = 16_384
"""Characters that are tokenised at a time: longer documents are cut into pieces, shorter ones are gathered into batches.
A lane that opens or resumes tokenises no more than this ahead."""

Place = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of a document.

    Attributes:
        text: its characters.
        ends: whether the document ends here (the end-of-text token follows).
        place: where it stands: small, JSON, and enough to start reading again at exactly this piece.
        begins: whether the document begins here.
    """

    text: str
    ends: bool
    place: Place
    begins: bool = True


@dataclass(frozen=True)
class Run:
    """Token ids of pieces that follow each other.

    Attributes:
        ids: int32 `(time,)`.
        ends: int64 `(pieces,)`, where each piece ends in `ids`.
        place: the place of the n-th piece; asked for once a block, because a place a piece would cost more than its tokens.
    """

    ids: np.ndarray
    ends: np.ndarray
    place: Callable[[int], Place]


def cut(text: str, limit: int = PIECE) -> list[str]:
    """`text` in pieces of at most `limit` characters, cut before white space where there is any, so that words stay whole."""
    pieces, start = [], 0
    while len(text) - start > limit:
        stop = start + limit
        space = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
        stop = space if space > 0 else stop
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, Place]]:
    """Token ids of each piece, int32 `(time,)`, with the piece's place; encoded in batches, for speed."""
    batch: list[Piece] = []
    size = 0

    def encoded() -> Iterator[tuple[np.ndarray, Place]]:
        ids = encode_pieces(tokenizer, [(piece.text, piece.begins, piece.ends) for piece in batch])
        return zip(ids, [piece.place for piece in batch], strict=True)

    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield from encoded()
            batch, size = [], 0
    if batch:
        yield from encoded()


def _always(place: Place, _: int) -> Place:
    return place


def pack(documents: Iterable[tuple[np.ndarray, Place]], length: int, offset: int = 0,
         tail: bool = False) -> Iterator[tuple[np.ndarray, Place, int]]:
    """Blocks of `length + 1` tokens, int32; each starts at the last token of the one before, so every token is a target once.

    Args:
        documents: token ids and their place.
        length: targets in a block.
        offset: tokens of the first document that earlier blocks have passed.
        tail: also yield the last, partial block, filled up with -1.

    Yields:
        (block, place, offset): packing again from that place and offset gives the blocks that follow.
    """
    runs = (Run(ids, np.array([len(ids)]), partial(_always, place)) for ids, place in documents)
    return pack_runs(runs, length, offset, tail)


def pack_runs(runs: Iterable[Run], length: int, offset: int = 0, tail: bool = False) -> Iterator[tuple[np.ndarray, Place, int]]:
    """`pack` for many pieces at a time: a block costs a handful of operations, however many pieces it holds."""
    carry, place = np.empty(0, np.int32), {}
    for run in runs:
        ids = run.ids[offset:]
        shift, offset = offset - len(carry), 0
        count = max(0, (len(carry) + len(ids) - 1) // length)
        if count:
            lasts = np.arange(length, count * length + 1, length) + shift  # the blocks' last tokens, as they stand in the run
            pieces = np.searchsorted(run.ends, lasts, side="right")
            offsets = lasts - np.where(pieces > 0, run.ends[pieces - 1], 0)
            used = length + 1 - len(carry)
            blocks = chain([np.concatenate([carry, ids[:used]])], _blocks(ids[used - 1 :], count - 1, length))
            for block, piece, at in zip(blocks, pieces.tolist(), offsets.tolist(), strict=True):
                yield block, run.place(piece), at
            carry = ids[used - 1 + (count - 1) * length :]  # the next block's first input is this block's last target
        else:
            carry = np.concatenate([carry, ids])
        if tail and len(run.ends):
            place = run.place(len(run.ends) - 1)
    if tail and len(carry) > 1:  # a lone token has no target
        yield np.concatenate([carry, np.full(length + 1 - len(carry), -1, np.int32)]), place, 0


def _blocks(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """The first `count` blocks of `ids`, `(count, length + 1)`, without a copy."""
    return np.lib.stride_tricks.as_strided(ids, (count, length + 1), (length * ids.itemsize, ids.itemsize))
