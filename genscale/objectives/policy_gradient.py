"""Improving a policy by reward while it stays near a reference: the loss, and how far from the best possible policy it is.

What is maximised over the policy p, for every prompt x, is the reward of what it writes minus what the distance from the
reference costs,

    J = E_p [ r(x, y) - beta (log p(y | x) - log p_ref(y | x)) ].

One distribution maximises it, p*(y | x) = p_ref(y | x) exp(r(x, y) / beta) / Z(x), and log Z - J / beta = KL(p || p*), the gap
in nats, which bounds the total variation to the optimum by sqrt(gap / 2) (Pinsker's inequality).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.objectives.base import Terms

STATISTICS = frozenset({"reward", "divergence", "flat_groups"})
"""Terms of `policy_loss` that are no part of the loss, of one answer each on average."""
MOST_SHIFT = 0.9
"""The smaller share of a mixture is a twentieth at least."""


def leave_one_out(values: Tensor) -> Tensor:
    """Values `(batch, group)`, each minus the mean of the others of its group: a baseline that does not depend on what it is
    taken from, so that the gradient stays unbiased (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free")."""
    group = values.shape[1]
    return (values - values.mean(1, keepdim=True)) * (group / (group - 1))


def policy_loss(log_p: Tensor, log_reference: Tensor, reward: Tensor, beta: float) -> Terms:
    """Leave-one-out REINFORCE (Williams 1992), with the divergence inside the reward: its gradient is minus that of J.

    The gradient of E_p[f] is E_p[f grad log p] where f is held fixed, also where f holds log p itself, for E_p[grad log p] is
    0. A divergence that is a term of the loss of its own instead (k1, k3 and their kin) has another gradient, and another
    optimum.

    Args:
        log_p: `(batch, group)` of whole answers, up to and with the token that ends them, under the policy that wrote them;
            with gradients.
        log_reference: the same under the reference.
        reward: `(batch, group)`.
        beta: what a nat of divergence costs.

    Returns:
        `loss` and `STATISTICS`, summed over answers; fp32 scalars.
    """
    divergence = (log_p.detach() - log_reference).float()
    advantage = leave_one_out(reward.float() - beta * divergence)
    flat = (reward == reward[:, :1]).all(1).sum() * reward.shape[1]
    return {"loss": -(advantage * log_p.float()).sum(), "reward": reward.float().sum(), "divergence": divergence.sum(),
            "flat_groups": flat.float()}


def gap_to_optimum(log_p: Tensor, log_reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """KL(p || p*) in nats of each prompt, fp64 `(batch,)`, estimated from answers of the policy and as many of the reference.

    log Z is that of the mean weight under a mixture of both, so that no weight is without bound. Their shares in it are those
    under which the policy's own probabilities, weighted so, sum to 1, as they are known to (Tan 2004, "On a likelihood approach
    for Monte Carlo integration"): the nearer the policy is to the optimum, the more a weight is its probability times Z, and
    the less is left of the error; at the optimum the gap is 0 whatever was drawn. The first-order bias of the logarithm is
    taken off. An estimate may be a little below 0.

    Args:
        log_p, log_reference, reward: `(batch, 2 x n)`, the policy's n answers first, the reference's after them.
    """
    if beta <= 0:
        raise ValueError(f"beta {beta}: without a price on divergence there is no optimum to be near to")
    log_p, log_reference, scaled = log_p.double(), log_reference.double(), reward.double() / beta
    count = log_p.shape[1]
    log_mixture = torch.logaddexp(log_p, log_reference) - math.log(2)
    excess = (log_p - log_mixture).exp() - 1  # of the policy's probability, from -1 to 1: 0 in expectation
    share = 1 + _shift(excess) * excess
    excess = excess / share
    log_weight = log_reference + scaled - log_mixture - share.log()
    log_z = log_weight.logsumexp(1, keepdim=True) - math.log(count)
    weight = (log_weight - log_z).exp()
    slope = (weight * excess).sum(1, keepdim=True) / excess.square().sum(1, keepdim=True).clamp(min=1e-30)
    variance = (weight - 1 - slope * excess).square().sum(1) / (count - 1)
    return log_z[:, 0] + variance / (2 * count) - (scaled - log_p + log_reference)[:, : count // 2].mean(1)


def _shift(excess: Tensor) -> Tensor:
    """By how much `(batch, 1)` the shares of a mixture differ, so that sum(excess / (1 + shift x excess)) is 0; not so far that
    one of them is next to nothing. The sum falls as the shift grows: bisection."""
    low, high = torch.full_like(excess[:, :1], -MOST_SHIFT), torch.full_like(excess[:, :1], MOST_SHIFT)
    for _ in range(60):
        middle = (low + high) / 2
        is_above = (excess / (1 + middle * excess)).sum(1, keepdim=True) > 0
        low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
    return (low + high) / 2
