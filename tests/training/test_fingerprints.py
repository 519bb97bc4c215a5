"""Digests of tensors against sums by hand: equal in any pieces, changed by any element, and telling rounding from the rest."""

from __future__ import annotations

import hashlib
import itertools
import struct

import pytest
import torch

from genscale.parallel.pieces import Piece
from genscale.rng import numpy_generator
from genscale.training.fingerprints import BLOCK, Fingerprint, Fingerprints, digest_of


class Alone:
    """One process."""

    def sum_of_numbers(self, *numbers: int) -> list[int]:
        return list(numbers)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def fingerprint(tensor: torch.Tensor, *cuts: int, name: str = "w") -> Fingerprint:
    flat, edges = tensor.reshape(-1), [0, *cuts, tensor.numel()]
    pieces = [Piece(name, tuple(tensor.shape), start, flat[start:stop]) for start, stop in itertools.pairwise(edges)]
    return Fingerprints([name], reversed(pieces)).total(Alone())[name]


def test_digest_is_the_sum_by_hand():
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    odd = numpy_generator(0, "fingerprints").integers(-(2**63), 2**63, BLOCK, dtype="int64").tolist()
    factor = int.from_bytes(hashlib.blake2b(b"0/w", digest_size=8).digest(), "little") | 1
    bits = [struct.unpack("i", struct.pack("f", value))[0] for value in tensor.reshape(-1).tolist()]
    assert fingerprint(tensor).digest == factor * sum(b * (m | 1) for b, m in zip(bits, odd, strict=False)) % 2**64


def test_any_pieces_add_up_to_the_same():
    tensor = torch.randn(BLOCK + 70_000, generator=torch.Generator().manual_seed(2))
    whole = fingerprint(tensor)
    assert whole.norm == pytest.approx(float(tensor.double().norm()), rel=1e-12)
    for cuts in ([1], [BLOCK], [5, BLOCK - 1, BLOCK + 1], list(range(1000, BLOCK, 50_000))):
        pieces = fingerprint(tensor, *cuts)
        assert pieces.digest == whole.digest
        assert pieces.norm == pytest.approx(whole.norm, rel=1e-12)
        assert pieces.projection == pytest.approx(whole.projection, rel=1e-9)


@pytest.mark.parametrize("element", [0, 1234, BLOCK - 1, BLOCK, BLOCK + 99])
def test_one_bit_of_one_element_shows(element):
    tensor = torch.randn(BLOCK + 100)
    other = tensor.clone()
    other[element] = torch.nextafter(other[element], torch.tensor(9.0))
    assert fingerprint(other).digest != fingerprint(tensor).digest


def test_exchanged_elements_blocks_and_names_show():
    tensor = torch.randn(2 * BLOCK)
    swapped = tensor.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    digests = {fingerprint(tensor).digest, fingerprint(swapped).digest, fingerprint(tensor.roll(BLOCK)).digest,
               fingerprint(tensor, name="v").digest}
    assert len(digests) == 4


def test_projections_tell_how_far_apart_tensors_are():
    """One element changed by 1e-3 in a long vector shows as 1e-3."""
    tensor = torch.randn(10_000, generator=torch.Generator().manual_seed(3)) * 1e-4
    other = tensor.clone()
    other[77] += 1e-3
    a, b = fingerprint(tensor), fingerprint(other)
    assert abs(a.projection - b.projection) == pytest.approx(1e-3, rel=1e-3)
    rounded = fingerprint(tensor * (1 + 2**-24))
    assert abs(a.projection - rounded.projection) < 1e-5 * a.norm


def test_whole_numbers_and_low_precision_count_too():
    counter = torch.tensor(3)
    assert digest_of("n", 0, counter) != digest_of("n", 0, counter + 1)
    half = torch.randn(64).bfloat16()
    assert digest_of("n", 0, half) == digest_of("n", 0, half.float())
