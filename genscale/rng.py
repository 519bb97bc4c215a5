"""Counter-based randomness: every draw is a pure function of an address, never of a rank, a worker or the past.

The address (seed, stream, step, sample, ...) is hashed to the 128-bit key of Philox (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), so two processes that ask for the same address get the same numbers, in any order.
"""

from __future__ import annotations

import hashlib

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
        """Standard normal draws of shape `(batch, *shape)` in fp32 for the named stream."""
        rows = [self._generator(stream, g).standard_normal(shape, np.float32) for g in self.samples.tolist()]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def uniform(self, stream: str, *shape: int) -> torch.Tensor:
        """Uniform draws on [0, 1) of shape `(batch, *shape)` in fp32 for the named stream."""
        rows = [self._generator(stream, g).random(shape, np.float32) for g in self.samples.tolist()]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def keys(self, stream: str) -> torch.Tensor:
        """One 64-bit number a sample, int64 `(batch,)`, for noise that is made on the device from a counter."""
        numbers = [int.from_bytes(_digest(self.seed, (self.scope, stream, self.step, g))[:8], "little", signed=True)
                   for g in self.samples.tolist()]
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)

    def _generator(self, stream: str, sample: int) -> np.random.Generator:
        return numpy_generator(self.seed, self.scope, stream, self.step, sample)
