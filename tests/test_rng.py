"""Addressed draws: the same numbers wherever a sample is computed, and numbers that are as random as they say."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from genscale.rng import Draws, DrawsAhead, numpy_generator, permutation, philox, torch_generator

GLOBAL = 24


def draws(samples: torch.Tensor, seed: int = 7, scope: str = "generator", step: int = 3) -> Draws:
    return Draws(seed, scope, step, samples)


@pytest.mark.parametrize(("counter", "key", "answer"), [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    """Known answers of Random123, the authors' library."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, answer)]
    assert philox(tuple(words[1]), np.array(words[0], np.uint64)).tolist() == words[2]


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("world, micro", [(1, 1), (1, 8), (2, 3), (3, 8), (4, 2), (6, 1), (24, 1)])
def test_a_sample_draws_the_same_in_any_split(kind: str, world: int, micro: int) -> None:
    whole = getattr(draws(torch.arange(GLOBAL)), kind)("noise", 2, 3)
    assert whole.shape == (GLOBAL, 2, 3) and whole.dtype == torch.float32
    assert len(torch.unique(whole)) == whole.numel(), "samples share numbers"
    for rank in range(world):
        for samples in torch.arange(rank, GLOBAL, world).split(micro):
            assert torch.equal(getattr(draws(samples), kind)("noise", 2, 3), whole[samples])


def test_asking_twice_or_for_more_streams_changes_nothing() -> None:
    samples = torch.arange(4)
    one = draws(samples)
    first = one.normal("noise", 5)
    one.uniform("augmentation", 9)
    assert torch.equal(one.normal("noise", 5), first)


def test_every_part_of_the_address_matters() -> None:
    samples = torch.arange(200)
    found = [draws(samples).normal("noise", 50), draws(samples).normal("epsilon", 50),
             draws(samples, scope="discriminator").normal("noise", 50), draws(samples, step=4).normal("noise", 50),
             draws(samples, seed=8).normal("noise", 50), draws(samples + 200).normal("noise", 50)]
    correlations = np.corrcoef(torch.stack(found).flatten(1).numpy())
    # 10,000 numbers each: independent streams correlate by 0.01 (one standard deviation), equal ones by 1.
    assert np.abs(correlations - np.eye(len(found))).max() < 0.05


def test_words_and_numbers_of_an_address_do_not_run_together() -> None:
    addresses = [(1, "ab", "c"), (1, "a", "bc"), (1, "abc"), (1, 1, 11), (1, 11, 1), (1, "1", 11), (11, 1, 1), (-1, 1, 11)]
    assert len({numpy_generator(*address).integers(2**62) for address in addresses}) == len(addresses)
    assert len({torch_generator(*address).initial_seed() for address in addresses}) == len(addresses)


def test_moments() -> None:
    samples = torch.arange(2000)
    normal = draws(samples).normal("noise", 100).double()
    uniform = draws(samples).uniform("noise", 100).double()
    # Bounds are five standard errors of each estimate over n draws.
    error = 5 / math.sqrt(normal.numel())
    assert abs(normal.mean()) < error
    assert abs(normal.var() - 1) < error * math.sqrt(2)
    assert abs((normal**3).mean()) < error * math.sqrt(15)
    assert abs((normal**4).mean() - 3) < error * math.sqrt(96)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < error * math.sqrt(1 / 12)
    assert abs(uniform.var() - 1 / 12) < error * math.sqrt(1 / 180)
    # Neighbours in a sample, and the same place in neighbouring samples, know nothing of each other.
    for first, second in ((normal[:, :-1], normal[:, 1:]), (normal[:-1], normal[1:])):
        assert abs((first * second).mean()) < error * 1.01


def test_permutations_are_uniform_and_addressed() -> None:
    assert np.array_equal(permutation(50, 1, "epoch", 0), permutation(50, 1, "epoch", 0))
    counts: dict[tuple[int, ...], int] = {}
    for address in range(2400):
        order = tuple(permutation(4, 1, "epoch", address).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom: above 49.7 once in a thousand.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7


def test_torch_generators_are_their_own() -> None:
    state = torch.get_rng_state()
    first = torch.randn(100, generator=torch_generator(1, "initial weights", "gpt"))
    assert torch.equal(first, torch.randn(100, generator=torch_generator(1, "initial weights", "gpt")))
    assert not torch.equal(first, torch.randn(100, generator=torch_generator(2, "initial weights", "gpt")))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


def test_what_is_drawn_is_what_earlier_versions_drew() -> None:
    """By hand from the words of Philox: old checkpoints go on with these numbers."""
    first = 2**33 + 5  # more than a word holds
    key = hashlib.sha256(repr((7, "generator", "noise", 3)).encode()).digest()
    key = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
    numbers = {kind: getattr(draws(torch.arange(first, first + 3)), kind)("noise", 2, 3) for kind in ("normal", "uniform")}
    for row in range(3):
        g = first + row
        words = [int(word) for block in range(2)
                 for word in philox(key, np.array([block, 0, g % 2**32, g >> 32], np.uint64))]
        uniform = [(word >> 8) / 2**24 for word in words]
        normal = [number for radius, angle in zip(words[::2], words[1::2], strict=True) for number in
                  (math.sqrt(-2 * math.log((radius + 1) / 2**32)) * turned(2 * math.pi * angle / 2**32)
                   for turned in (math.cos, math.sin))]
        assert numbers["uniform"][row].flatten().tolist() == uniform[:6]
        assert torch.allclose(numbers["normal"][row].flatten().double(), torch.tensor(normal[:6]).double(), rtol=1e-6, atol=0)


def test_draws_ahead_are_those_of_their_address() -> None:
    """Of phases that run in some steps alone, in two micro-batches, with samples left out and after going back."""
    ahead = DrawsAhead(GLOBAL, {"lazy": 4})
    for step in (*range(1, 50, 3), *range(28, 40), 90):
        for scope in ("generator", "lazy") if step % 4 == 0 else ("generator",):
            for samples in (torch.arange(GLOBAL) + GLOBAL * (step + (step > 20))).split(GLOBAL // 2):
                for kind, shape in (("normal", (5,)), ("uniform", ()), ("normal", (15, 100))):
                    for _ in range(2):
                        found = getattr(ahead(7, scope, step, samples), kind)("noise", *shape)
                        assert torch.equal(found, getattr(Draws(7, scope, step, samples), kind)("noise", *shape))
                        found.zero_()  # is done to nobody else's
