"""Dropout whose masks are addressed by sample: the same sample drops the same activations on any rank, in any micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of SplitMix64
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # its two multipliers, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed_words(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014, "Fast splittable pseudorandom number generators"), element by element."""
    # torch shifts int64 with its sign: the copies of the sign bit are masked away.
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _FIRST
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def random_words(keys: Tensor, stream: int, count: int, first: int = 0) -> Tensor:
    """Uniform int16 `(batch, count)`, a function of each sample's key `(batch,)` int64 and the stream alone: those from number
    `first` on."""
    # Each 64-bit word of the counter-based stream gives four.
    before, after = first // 4, -(-(first + count) // 4)
    words = torch.arange(1, after - before + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    start = mixed_words(keys ^ (stream + 1))
    if before:
        ones = -(keys | -1)  # which no compiler knows: what it computes of numbers that it knows does not wrap as int64 does
        start = start + ones * before * _GOLDEN
    drawn = mixed_words(start[:, None] + words)
    if torch.compiler.is_compiling():  # torch 2.13 compiles views of another width wrongly where they end within a word
        quarters = torch.stack([drawn << 48 - 16 * place >> 48 for place in range(4)], dim=-1).to(torch.int16).flatten(1)
    else:
        quarters = drawn.view(torch.int16)
    return quarters[:, first % 4:first % 4 + count]


def dropped(x: Tensor, keys: Tensor, stream: int, share: float, index: int = 0) -> Tensor:
    """`x` with a share of its elements zero and the others scaled up (Srivastava et al. 2014).

    Args:
        x: `(batch, ...)`.
        keys: `(batch,)` int64, one a sample, on the device of `x`.
        stream: tells the places in a network apart that drop.
        share: of the elements, in steps of 1/65536.
        index: `x` is this one of equal parts, along its second dimension, of what is dropped from.
    """
    threshold = round(share * 2**16)
    size = x[0].numel()
    kept = (random_words(keys, stream, size, index * size) >= threshold - 2**15).view(x.shape)
    return x * kept * (1 / (1 - threshold / 2**16))
