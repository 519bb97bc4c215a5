"""Digests of tensors that are the same however a tensor is cut into pieces: each process takes its own, and the sums agree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from genscale.parallel.pieces import Piece
from genscale.parallel.processes import Processes
from genscale.rng import numpy_generator

BLOCK = 2**18
"""Elements that share a factor, so that the table of multipliers stays this short."""


@dataclass(frozen=True)
class Fingerprint:
    """What one tensor is known by.

    Attributes:
        digest: equal bits of all elements, in fp32, give equal digests, at any sharding.
        norm: Euclidean.
        projection: on a fixed vector of signs. Two tensors' projections are some norm of their difference apart, which their
            norms do not tell: so what rounding did can be told from what is another run.
    """

    digest: int
    norm: float
    projection: float


def digest_of(name: str, first: int, piece: Tensor) -> Tensor:
    """Sum of bits x odd multiplier over the elements, modulo 2**64, int64 `()`. Digests of the pieces of a tensor add up to
    that of the tensor; a single changed element always changes it."""
    flat = _flat(piece)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for factor, columns, part in _blocks(name, first, flat):
        bits = part.float().view(torch.int32).long() if part.is_floating_point() else part.long()
        total += factor * (bits * _multipliers(flat.device)[columns]).sum()
    return total


def _moments(name: str, first: int, piece: Tensor) -> Tensor:
    """(sum of squares, projection), fp64 `(2,)`: they add up over pieces."""
    flat = _flat(piece)
    total = torch.zeros(2, dtype=torch.float64, device=flat.device)
    for factor, columns, part in _blocks(name, first, flat):
        part = part.double()
        projection = part.dot(_signs(flat.device)[columns])
        total += torch.stack([part.dot(part), projection if factor > 0 else -projection])
    return total


class Fingerprints:
    """Gathers what this process holds of the named tensors, then adds up over all processes.

    Args:
        names: of all tensors, in the same order on every process.
    """

    def __init__(self, names: Iterable[str], pieces: Iterable[Piece]) -> None:
        digests = {name: torch.zeros((), dtype=torch.int64) for name in names}
        moments = {name: torch.zeros(2, dtype=torch.float64) for name in digests}
        for piece in pieces:
            name, values = piece.name, piece.values
            digests[name] = digests[name].to(values.device) + digest_of(name, piece.first, values)
            moments[name] = moments[name].to(values.device) + _moments(name, piece.first, values)
        self._names = list(digests)
        # Read together at the end: each would make the host wait for a GPU.
        self._digests, self._moments = list(digests.values()), list(moments.values())

    def total(self, processes: Processes) -> dict[str, Fingerprint]:
        """By tensor. Collective."""
        if not self._names:
            return {}
        digests = processes.sum_of_numbers(*torch.stack([value.cpu() for value in self._digests]).tolist())
        moments = processes.sum(torch.stack([value.cpu() for value in self._moments])).tolist()
        return {name: Fingerprint(digest % 2**64, math.sqrt(square), projection)
                for name, digest, (square, projection) in zip(self._names, digests, moments, strict=True)}


def _flat(piece: Tensor) -> Tensor:
    return piece.detach().reshape(-1)


def _blocks(name: str, first: int, flat: Tensor) -> Iterable[tuple[int, slice, Tensor]]:
    """(factor of the block, columns of the tables, elements) of a piece, cut where the whole tensor's blocks end."""
    start = 0
    while start < len(flat):
        block, column = divmod(first + start, BLOCK)
        stop = min(len(flat), start + BLOCK - column)
        yield _factor(name, block), slice(column, column + stop - start), flat[start:stop]
        start = stop


def _factor(name: str, block: int) -> int:
    """Odd, so that nothing but zero becomes zero modulo 2**64."""
    return int.from_bytes(hashlib.blake2b(f"{block}/{name}".encode(), digest_size=8).digest(), "little", signed=True) | 1


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd int64 `(BLOCK,)`."""
    odd = numpy_generator(0, "fingerprints").integers(-(2**63), 2**63, BLOCK, dtype="int64") | 1
    return torch.from_numpy(odd).to(device)


@cache
def _signs(device: torch.device) -> Tensor:
    """+1 or -1, fp64 `(BLOCK,)`."""
    return _multipliers(device).sign().double()
