"""Packing against plain slicing of the concatenated tokens."""

from __future__ import annotations

import numpy as np
import pytest

from genscale.data.packing import PIECE, Piece, Run, cut, pack, pack_runs, tokenise
from genscale.data.text.tokenizers import ByteTokenizer


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


@pytest.mark.parametrize("length", [1, 3, 16, 200])
def test_runs_of_pieces_pack_as_the_pieces_alone(length: int) -> None:
    draw = np.random.default_rng(0)
    parts = documents(draw.integers(0, 40, 60).tolist())
    runs, at = [], 0
    while at < len(parts):
        some = parts[at : at + int(draw.integers(1, 9))]
        places = [place for _, place in some]
        runs.append(Run(np.concatenate([ids for ids, _ in some]), np.cumsum([len(ids) for ids, _ in some]), places.__getitem__))
        at += len(some)
    expected = [(block.tolist(), place, offset) for block, place, offset in pack(parts, length)]
    assert [(block.tolist(), place, offset) for block, place, offset in pack_runs(runs, length)] == expected


def test_skipping_into_a_run() -> None:
    ids = np.arange(100, dtype=np.int32)
    run = Run(ids, np.array([30, 30, 100]), [{"document": i} for i in range(3)].__getitem__)
    blocks = [(block.tolist(), place["document"], offset) for block, place, offset in pack_runs([run], 10, 25)]
    assert blocks[0] == (list(range(25, 36)), 2, 5)
    assert blocks[-1] == (list(range(85, 96)), 2, 65)
