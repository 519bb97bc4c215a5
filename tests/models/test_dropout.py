"""Dropout that is addressed by sample: a true dropout, and the same one wherever the sample stands."""

from __future__ import annotations

import math

import pytest
import torch

from genscale.families.gpt.network import GPT, GPTSettings
from genscale.models.dropout import dropped
from genscale.rng import Draws


def keys(*samples: int, step: int = 1, stream: str = "dropout") -> torch.Tensor:
    return Draws(0, "language_model", step, torch.tensor(samples)).keys(stream)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_mean_kept(share: float) -> None:
    count = 400_000
    out = dropped(torch.ones(4, count // 4), keys(0, 1, 2, 3), 0, share)
    # Five standard errors of a share and of the mean it leaves.
    error = 5 * math.sqrt(share * (1 - share) / count)
    assert (out == 0).float().mean().item() == pytest.approx(share, abs=error)
    assert out.mean().item() == pytest.approx(1, abs=error / (1 - share))
    assert out.max().item() == pytest.approx(1 / (1 - share), rel=1e-3)


def test_masks_of_samples_steps_places_and_neighbours_are_independent() -> None:
    def mask(*samples: int, step: int = 1, place: int = 0) -> torch.Tensor:
        return dropped(torch.ones(len(samples), 100_000), keys(*samples, step=step), place, 0.5) == 0

    first = mask(0)[0]
    others = [mask(1)[0], mask(0, step=2)[0], mask(0, place=1)[0], *(first.roll(shift) for shift in (1, 2, 3, 4, 64))]
    for other in others:
        assert (first & other).float().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 100_000))


def test_a_sample_drops_the_same_whatever_stands_beside_it() -> None:
    x = torch.randn(4, 7, 33, generator=torch.Generator().manual_seed(0))
    together = dropped(x, keys(10, 11, 12, 13), 5, 0.3)
    for row in range(4):
        assert torch.equal(dropped(x[row:row + 1], keys(10 + row), 5, 0.3)[0], together[row])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(6, 7, 5), (6, 8, 3)])  # words begin within a draw of four, and with one
def test_a_part_drops_what_the_whole_does(shape: tuple[int, ...], compiled: bool) -> None:
    whole, drop = dropped(torch.ones(3, *shape), keys(4, 5, 6), 2, 0.3), torch.compile(dropped) if compiled else dropped
    for index in range(3):
        part = drop(torch.ones(3, 2, *shape[1:]), keys(4, 5, 6), 2, 0.3, index)
        assert torch.equal(part, whole[:, 2 * index:2 * index + 2])


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_a_model_drops_in_training_only_and_by_sample(kind: str) -> None:
    network = GPT(GPTSettings(layers=2, heads=2, width=16, positions=16, init_std=0.3, **{kind: 0.2}), 61)
    network.initialise(0)
    tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    plain = network(tokens)
    noisy = network(tokens, dropout_keys=keys(0, 1, 2, 3))
    assert torch.equal(plain, network(tokens)) and not torch.allclose(noisy, plain, atol=1e-3)
    torch.testing.assert_close(network(tokens[2:], dropout_keys=keys(2, 3)), noisy[2:], rtol=1e-5, atol=1e-5)


def test_compiled_blocks_share_their_graphs_whatever_their_number() -> None:
    network = GPT(GPTSettings(layers=10, heads=1, width=8, positions=8, dropout=0.2), 11)
    network.initialise(0)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    expected = network(tokens, dropout_keys=keys(0, 1))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, fail_on_recompile_limit_hit=True):
        for block in network.blocks():
            block.compile(backend="eager")
        torch.testing.assert_close(network(tokens, dropout_keys=keys(0, 1)), expected)


def test_attention_without_drops_equals_the_fused_kernel() -> None:
    kept = GPT(GPTSettings(layers=2, heads=2, width=16, positions=16, init_std=0.3, attention_dropout=1e-9), 61)
    kept.initialise(0)  # 1e-9 rounds to no drop at all, but takes the open path
    tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kept(tokens, dropout_keys=keys(0, 1, 2, 3)), kept(tokens), rtol=1e-5, atol=1e-5)
