"""Counter-based randomness: every draw is a pure function of an address, never of a rank, a worker or the past.

The address (seed, stream, step, sample, ...) is hashed to the key of Philox (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), or stands in its counter, so two processes that ask for the same address get the same numbers, in any order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

Address = str | int
Kind = Literal["normal", "uniform"]

TOGETHER = 2**13
"""Blocks of 128 bits that are computed together: so many that calls cost little beside them, so few that a cache holds them."""
AHEAD, AHEAD_STEPS = 2**15, 32
"""Numbers that are drawn ahead at most, and steps."""


def _digest(seed: int, address: tuple[Address, ...]) -> bytes:
    # repr keeps 1 and "1", and ("ab", "c") and ("a", "bc"), apart.
    return hashlib.sha256(repr((int(seed), *address)).encode()).digest()


def numpy_generator(seed: int, *address: Address) -> np.random.Generator:
    """A NumPy generator for this address alone."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, address)[:16], "little")))


def torch_generator(seed: int, *address: Address, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for this address alone (for initial weights and for sampling)."""
    return torch.Generator(device=device).manual_seed(int.from_bytes(_digest(seed, address)[:8], "little") >> 1)


def permutation(n: int, seed: int, *address: Address) -> np.ndarray:
    """A uniform permutation of `range(n)` for this address."""
    return numpy_generator(seed, *address).permutation(n)


def philox(key: tuple[int, int] | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): 128 random bits for each counter.

    Args:
        key: two words of 32 bits; or uint64 `(2, ...)`, which broadcasts against a word of the counters.
        counters: uint64 `(4, ...)`, words of 32 bits.

    Returns:
        uint64 `(4, ...)`, words of 32 bits.
    """
    keys = np.array(key, np.uint64)
    keys = keys.reshape(*keys.shape, *[1] * (counters.ndim - keys.ndim))
    words = np.empty_like(counters)
    words[0::2], words[1::2] = _rounds(keys, counters[2::-2].copy(), counters[1::2].copy())
    return words


def _rounds(keys: np.ndarray, even: np.ndarray, odd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The words (w0, w2) and (w1, w3) of counters (c2, c0) and (c1, c3), which it overwrites."""
    shape = 2, *[1] * (even.ndim - 1)
    factors = _FACTORS.reshape(shape)
    product, high = np.empty_like(even), np.empty_like(even)
    for key in (keys + _RAISED.reshape(-1, *shape)) & _WORD:
        np.multiply(even, factors, out=product)
        np.right_shift(product, _HALF, out=high)
        np.bitwise_xor(high, odd, out=high)
        np.bitwise_xor(high, key, out=high)
        np.bitwise_and(product, _WORD, out=odd)
        even = high[::-1]
    return high, odd


_FACTORS = np.array([0xCD9E8D57, 0xD2511F53], np.uint64)
_RAISED = np.arange(10, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_HALF, _WORD = np.uint64(32), np.uint64(0xFFFFFFFF)


def _numbers(kind: Kind, keys: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """Draws in fp32 `(steps, batch, count)`, of a key for each step, `(2, steps)`, and samples `(steps, batch)`, all uint64."""
    steps, batch = samples.shape
    blocks = -(-count // 4)
    numbers = np.empty((steps, batch, blocks, 2, 2), np.float32)
    some, rows = (max(1, TOGETHER // max(1, size)) for size in (batch * blocks, blocks))
    for step in range(0, steps, some):
        for row in range(0, batch, rows):
            here = slice(step, step + some), slice(row, row + rows)
            _KINDS[kind](numbers[here], *_words(keys[:, here[0]], samples[here], blocks))
    return numbers.reshape(steps, batch, -1)[..., :count]


def _words(keys: np.ndarray, samples: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of 32 bits, uint64, the first and third of each block of four, and the second and fourth, `(2, steps, batch,
    blocks)`."""
    steps, batch = samples.shape
    if batch < blocks:
        even, odd = np.empty((2, 2, steps, batch, blocks), np.uint64)
    else:  # the longer innermost in memory, where loops are fast
        even, odd = np.empty((2, 2, steps, blocks, batch), np.uint64).swapaxes(3, 4)
    block, samples = np.arange(blocks, dtype=np.uint64), samples[..., None]
    even[0], even[1] = samples & _WORD, block & _WORD
    odd[0], odd[1] = block >> _HALF, samples >> _HALF
    return _rounds(keys[..., None, None], even, odd)


def _normal(into: np.ndarray, even: np.ndarray, odd: np.ndarray) -> None:
    """Box and Muller 1958: a pair of numbers from two words."""
    radius, angle = even.astype(np.float64), odd.astype(np.float64)
    radius += 1
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2
    np.sqrt(radius, out=radius)
    angle *= 2 * np.pi * 2.0**-32
    into[..., 0] = (radius * np.cos(angle)).transpose(1, 2, 3, 0)
    into[..., 1] = (radius * np.sin(angle)).transpose(1, 2, 3, 0)


def _uniform(into: np.ndarray, even: np.ndarray, odd: np.ndarray) -> None:
    for place, words in enumerate((even, odd)):
        words >>= np.uint64(8)  # 24 bits, as many as fp32 has: more would round up to 1
        into[..., place] = words.transpose(1, 2, 3, 0)
    into *= np.float32(2.0**-24)


_KINDS = {"normal": _normal, "uniform": _uniform}


class Draws:
    """The random numbers of one micro-batch, addressed by sample: sample g draws the same noise on any rank, in any
    micro-batch.

    Args:
        seed: the run's seed.
        scope: name of the phase that draws, so that phases sharing a batch do not share noise.
        step: the optimizer step the draws belong to.
        samples: `(batch,)` global sample numbers of the micro-batch.
        device: where the numbers are wanted. They are drawn on the CPU, so that every device sees the same ones.
    """

    rehearsal: bool = False
    """This is the dry batch: what is longer or shorter by chance is to be as long as it can be, and is made for nobody."""

    def __init__(self, seed: int, scope: str, step: int, samples: torch.Tensor, device: str | torch.device = "cpu") -> None:
        self.seed, self.scope, self.step, self.samples, self.device = seed, scope, step, samples, device

    def made(self, what: str, tokens: torch.Tensor) -> None:
        """Tell a run's trace what was made of the draws: tokens `(batch, ...)`, -1 where there is none, so that `genscale
        compare` names the first that another run has otherwise."""

    def normal(self, stream: str, *shape: int) -> torch.Tensor:
        """Standard normal draws of shape `(batch, *shape)` in fp32 for the named stream."""
        return self._draw("normal", stream, shape)

    def uniform(self, stream: str, *shape: int) -> torch.Tensor:
        """Uniform draws on [0, 1) of shape `(batch, *shape)` in fp32 for the named stream."""
        return self._draw("uniform", stream, shape)

    def keys(self, stream: str) -> torch.Tensor:
        """One 64-bit number a sample, int64 `(batch,)`, for noise that is made on the device from a counter."""
        numbers = [int.from_bytes(_digest(self.seed, (self.scope, stream, self.step, g))[:8], "little", signed=True)
                   for g in self.samples.tolist()]
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def _draw(self, kind: Kind, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.of_steps(kind, stream, shape, [self.step], self.samples.cpu().numpy()[None])[0]

    def of_steps(self, kind: Kind, stream: str, shape: tuple[int, ...], steps: Sequence[int],
                 samples: np.ndarray) -> torch.Tensor:
        """The draws of several steps, `(steps, batch, *shape)`, for samples `(steps, batch)`."""
        digests = [_digest(self.seed, (self.scope, stream, step))[:8] for step in steps]
        keys = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2).T.astype(np.uint64)
        numbers = _numbers(kind, keys, samples.astype(np.uint64), math.prod(shape))
        return torch.from_numpy(np.ascontiguousarray(numbers).reshape(*samples.shape, *shape)).to(self.device)


class DrawsAhead:
    """Makes the `Draws` of a run's steps. Where a step takes few numbers, a call costs more than they do: those of the steps
    to come, whose addresses are known, are then drawn with them.

    Args:
        samples_a_step: by so much do the samples' numbers go up from step to step.
        every: by scope, the steps between two that draw in it.
    """

    def __init__(self, samples_a_step: int, every: Mapping[str, int]) -> None:
        self.samples_a_step, self.every = samples_a_step, every
        self._drawn: dict[tuple[object, ...], dict[int, tuple[bytes, torch.Tensor]]] = {}  # by step, of which samples

    def __call__(self, seed: int, scope: str, step: int, samples: torch.Tensor, device: str | torch.device = "cpu") -> Draws:
        return _Foreseen(self, seed, scope, step, samples, device)

    def find(self, draws: _Foreseen, kind: Kind, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What was drawn ahead for this address, or is drawn now."""
        samples, step = draws.samples.cpu().numpy(), draws.step
        ahead = min(AHEAD // max(1, len(samples) * math.prod(shape)), AHEAD_STEPS)
        if ahead < 2:
            return draws.of_steps(kind, stream, shape, [step], samples[None])[0]
        # Of several micro-batches each has its own.
        offset = int(samples[0]) - step * self.samples_a_step
        key = draws.seed, draws.scope, kind, stream, shape, draws.device, len(samples), offset
        found = self._drawn.get(key, {}).get(step)
        if found is None or found[0] != samples.tobytes():
            steps = range(step, step + ahead * self.every.get(draws.scope, 1), self.every.get(draws.scope, 1))
            foreseen = samples + (np.array(steps) - step)[:, None] * self.samples_a_step
            numbers = draws.of_steps(kind, stream, shape, steps, foreseen).unbind()
            self._drawn = {key: drawn for key, drawn in self._drawn.items() if step <= max(drawn)}
            self._drawn[key] = {step: (row.tobytes(), each)
                                for step, row, each in zip(steps, foreseen, numbers, strict=True)}
            found = self._drawn[key][step]
        return found[1].clone()  # memory of its own, which whoever draws may write to


class _Foreseen(Draws):
    def __init__(self, ahead: DrawsAhead, *address: Any) -> None:
        super().__init__(*address)
        self._ahead = ahead

    def _draw(self, kind: Kind, stream: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._ahead.find(self, kind, stream, shape)
