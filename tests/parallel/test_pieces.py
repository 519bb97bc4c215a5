"""Pieces of tensors: over all processes every element once, about as much for each."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from genscale.parallel.pieces import Piece, pieces_of

TENSORS = {"embedding": torch.randn(50, 8), "scale": torch.tensor(2.0), "empty": torch.zeros(0, 4), "w": torch.randn(9, 8),
           "turned": torch.randn(6, 7).T, "seen": torch.arange(5), **{f"step/{i}": torch.tensor(float(i)) for i in range(20)}}


def put_together(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """The tensors that the pieces of all processes make."""
    made: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = made.setdefault(piece.name, torch.full(piece.shape, -1, dtype=piece.values.dtype))
        tensor.view(-1)[piece.first:piece.first + piece.values.numel()] = piece.values.reshape(-1)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_every_tensor_is_one_process_s(world_size: int) -> None:
    dealt = [pieces_of(TENSORS.items(), rank, world_size) for rank in range(world_size)]
    names = [piece.name for pieces in dealt for piece in pieces]
    assert sorted(names) == sorted(TENSORS)
    made = put_together(piece for pieces in dealt for piece in pieces)
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    again = [pieces_of(reversed(TENSORS.items()), rank, world_size) for rank in range(world_size)]
    assert [[piece.name for piece in pieces] for pieces in again] == [[piece.name for piece in pieces] for pieces in dealt]


def test_all_write_about_as_much() -> None:
    sizes = torch.randint(1, 10_000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    tensors = {f"t{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    loads = [sum(piece.values.nbytes for piece in pieces_of(tensors.items(), rank, 8)) for rank in range(8)]
    assert max(loads) < 1.01 * sum(loads) / 8
