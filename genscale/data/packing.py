"""Packing documents end to end into blocks, each with the place in the documents where the next block starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from genscale.data.tokenizers import Tokenizer

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
    """

    text: str
    ends: bool
    place: Place


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
        ids = tokenizer.encode_documents([piece.text for piece in batch], [piece.ends for piece in batch])
        return zip(ids, [piece.place for piece in batch], strict=True)

    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield from encoded()
            batch, size = [], 0
    if batch:
        yield from encoded()


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
    parts: list[np.ndarray] = []
    held, place = 0, {}
    for tokens, place in documents:
        while offset < len(tokens):
            part = tokens[offset : offset + length + 1 - held]
            parts.append(part)
            held += len(part)
            offset += len(part)
            if held == length + 1:
                offset -= 1  # the next block's first input is this block's last target
                yield np.concatenate(parts), place, offset
                parts, held = [], 0
        offset = 0
    if tail and held > 1:  # a lone token has no target
        yield np.concatenate([*parts, np.full(length + 1 - held, -1, np.int32)]), place, offset
