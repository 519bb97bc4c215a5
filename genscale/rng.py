"""Counter-based randomness: every draw is a pure function of an address, never of a rank, a worker or the past.

The address (seed, stream, step, sample, ...) is hashed to the key of Philox (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), or stands in its counter, so two processes that ask for the same address get the same numbers, in any order.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

Address = str | int


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


def philox(key: tuple[int, int], counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): 128 random bits for each counter.

    Args:
        key: two words of 32 bits.
        counters: uint64 `(4, ...)`, words of 32 bits.

    Returns:
        uint64 `(4, ...)`, words of 32 bits.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        first, third = _FACTORS[0] * c0, _FACTORS[1] * c2
        c0, c1 = (third >> _HALF) ^ c1 ^ np.uint64(k0), third & _WORD
        c2, c3 = (first >> _HALF) ^ c3 ^ np.uint64(k1), first & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_HALF, _WORD = np.uint64(32), np.uint64(0xFFFFFFFF)


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

    def __init__(self, seed: int, scope: str, step: int, samples: torch.Tensor, device: str | torch.device = "cpu") -> None:
        self.seed, self.scope, self.step, self.samples, self.device = seed, scope, step, samples, device

    def normal(self, stream: str, *shape: int) -> torch.Tensor:
        """Standard normal draws of shape `(batch, *shape)` in fp32 for the named stream (Box and Muller 1958)."""
        words = self._words(stream, shape).astype(np.float64)
        radius = np.sqrt(-2 * np.log((words[:, 0::2] + 1) * 2.0**-32))
        angle = words[:, 1::2] * (2 * np.pi * 2.0**-32)
        numbers = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2).astype(np.float32)
        return self._shaped(numbers.reshape(len(words), -1), shape)

    def uniform(self, stream: str, *shape: int) -> torch.Tensor:
        """Uniform draws on [0, 1) of shape `(batch, *shape)` in fp32 for the named stream."""
        # 24 bits, as many as fp32 has: more would round up to 1.
        return self._shaped((self._words(stream, shape) >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24), shape)

    def keys(self, stream: str) -> torch.Tensor:
        """One 64-bit number a sample, int64 `(batch,)`, for noise that is made on the device from a counter."""
        numbers = [int.from_bytes(_digest(self.seed, (self.scope, stream, self.step, g))[:8], "little", signed=True)
                   for g in self.samples.tolist()]
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def _words(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """Random words of 32 bits, uint64 `(batch, at least as many as shape holds, a multiple of 4)`."""
        key = _digest(self.seed, (self.scope, stream, self.step))
        samples = self.samples.cpu().numpy().astype(np.uint64)[:, None]
        blocks = np.arange(-(-math.prod(shape) // 4), dtype=np.uint64)[None]
        counters = np.stack(np.broadcast_arrays(blocks & _WORD, blocks >> _HALF, samples & _WORD, samples >> _HALF))
        words = philox((int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")), counters)
        return words.transpose(1, 2, 0).reshape(len(samples), -1)

    def _shaped(self, numbers: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = np.ascontiguousarray(numbers[:, : math.prod(shape)])
        return torch.from_numpy(numbers.reshape(len(numbers), *shape)).to(self.device)
