"""Policy gradients against a distribution that is small enough to be summed over."""

from __future__ import annotations

import pytest
import torch

from genscale.objectives.policy_gradient import gap_to_optimum, leave_one_out, policy_loss

BETA = 0.25


@pytest.fixture
def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a policy and of a reference over twelve answers, and their rewards."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    return policy, reference, (torch.arange(12) % 3 == 0).double()


def test_the_expected_gradient_is_that_of_the_objective(world):
    policy, reference, reward = world
    policy.requires_grad_()
    log_p, log_reference = policy.log_softmax(0), reference.log_softmax(0)
    objective = (log_p.exp() * (reward - BETA * (log_p - log_reference))).sum()
    (true,) = torch.autograd.grad(objective, policy)
    # All pairs of answers, each as often as it is written: the expectation over groups of two, without a draw.
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    expected = torch.zeros_like(policy)
    for pair in pairs:
        probability = log_p.detach().exp()[pair].prod()
        loss = policy_loss(policy.log_softmax(0)[pair][None], log_reference[pair][None], reward[pair][None], BETA)["loss"]
        expected -= torch.autograd.grad(loss, policy)[0] / 2 * probability
    torch.testing.assert_close(expected, true, rtol=1e-5, atol=1e-6)


def test_baseline_leaves_its_own_value_out():
    values = torch.tensor([[1.0, 2.0, 6.0]])
    torch.testing.assert_close(leave_one_out(values), torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]))


def test_statistics_are_sums_over_answers():
    terms = policy_loss(torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]), torch.tensor([[-1.5, -2.0], [-1.0, -3.0]]),
                        torch.tensor([[1.0, 0.0], [1.0, 1.0]]), BETA)
    assert {name: terms[name].item() for name in ("reward", "divergence", "flat_groups")} == {
        "reward": 3.0, "divergence": 2.5, "flat_groups": 2.0}


@pytest.mark.parametrize("at_optimum", [False, True])
def test_gap_is_the_divergence_from_the_optimum(world, at_optimum):
    policy, reference, reward = world
    log_reference = reference.log_softmax(0)
    optimum = (log_reference + reward / BETA).log_softmax(0)
    log_p = optimum if at_optimum else policy.log_softmax(0)
    true = (log_p.exp() * (log_p - optimum)).sum()
    generator = torch.Generator().manual_seed(5)
    written = torch.multinomial(log_p.exp(), 400 * 32, replacement=True, generator=generator).view(400, 32)
    referred = torch.multinomial(log_reference.exp(), 400 * 32, replacement=True, generator=generator).view(400, 32)
    answers = torch.cat([written, referred], 1)
    estimates = gap_to_optimum(log_p[answers], log_reference[answers], reward[answers], BETA)
    error = estimates.std() / 20
    assert (estimates.mean() - true).abs() < 4 * error + 2e-3
    assert error < (1e-3 if at_optimum else 0.05)


def test_gap_near_the_optimum_is_known_well(world):
    """It bounds the distance to the optimum: an error of 0.02 nats, as of the plain mean weight, would bound nothing there."""
    _, reference, reward = world
    log_reference = reference.log_softmax(0)
    optimum = (log_reference + reward / BETA).log_softmax(0)
    log_p = (optimum + 0.1 * torch.randn(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).log_softmax(0)
    true = (log_p.exp() * (log_p - optimum)).sum()
    generator = torch.Generator().manual_seed(5)
    answers = torch.cat([torch.multinomial(each.exp(), 200 * 256, replacement=True, generator=generator).view(200, 256)
                         for each in (log_p, log_reference)], 1)  # fmt: skip
    estimates = gap_to_optimum(log_p[answers], log_reference[answers], reward[answers], BETA)
    assert true < 0.01
    assert (estimates - true).square().mean().sqrt() < 0.008
