"""Packing against plain slicing of the concatenated tokens."""

from __future__ import annotations

import numpy as np
import pytest

from genscale.data.packing import PIECE, Piece, cut, pack, tokenise
from genscale.data.tokenizers import ByteTokenizer


def documents(sizes: list[int]) -> list[tuple[np.ndarray, dict]]:
    values = iter(range(10_000))
    return [(np.array([next(values) for _ in range(size)], np.int32), {"document": i}) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_blocks_are_slices_of_the_concatenation(length: int) -> None:
    parts = documents([3, 1, 17, 0, 5, 1, 1, 40, 2])
    everything = np.concatenate([tokens for tokens, _ in parts])
    blocks = [block for block, _, _ in pack(parts, length)]
    assert len(blocks) == (len(everything) - 1) // length
    for i, block in enumerate(blocks):
        np.testing.assert_array_equal(block, everything[i * length : i * length + length + 1])


@pytest.mark.parametrize(("size", "blocks"), [
    (6, [[0, 1, 2, 3, 4], [4, 5, -1, -1, -1]]),
    (5, [[0, 1, 2, 3, 4]]),  # the carried token alone has no target
    (2, [[0, 1, -1, -1, -1]]),
    (1, []),
])
def test_tail_is_padded_only_where_a_target_is_left(size: int, blocks: list[list[int]]) -> None:
    assert [block.tolist() for block, _, _ in pack(documents([size]), 4, tail=True)] == blocks


def test_every_place_continues_exactly() -> None:
    parts = documents([3, 1, 17, 5, 1, 1, 40, 2])
    blocks = list(pack(parts, 4))
    for i, (_, place, offset) in enumerate(blocks):
        rest = [block.tolist() for block, _, _ in pack(parts[place["document"] :], 4, offset)]
        assert rest == [block.tolist() for block, _, _ in blocks[i + 1 :]]


def test_long_documents_are_cut_before_spaces_and_lose_nothing() -> None:
    text = "lorem ipsum dolor sit amet\n" * 3000 + "x" * (PIECE + 5)
    pieces = cut(text)
    assert "".join(pieces) == text and all(0 < len(piece) <= PIECE for piece in pieces)
    assert all(piece[0] in " \n" for piece in pieces[1:-2])
    assert cut("short") == ["short"]


def test_end_of_text_follows_the_document_and_not_its_pieces() -> None:
    pieces = [Piece("ab", False, {}), Piece("c", True, {}), Piece("dé", True, {})]
    tokens = np.concatenate([ids for ids, _ in tokenise(pieces, ByteTokenizer())]).tolist()
    assert tokens == [*b"abc", 256, *"dé".encode(), 256]
