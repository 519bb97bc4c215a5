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

    log Z is that of the mean weight under the mixture of both (Veach and Guibas 1995, the balance heuristic), which is bounded
    by 2 exp(r / beta) and, at the optimum, by 2 Z; a jackknife takes the first-order bias off the logarithm. An estimate may be
    a little below 0.

    Args:
        log_p, log_reference, reward: `(batch, 2 x n)`, the policy's n answers first, the reference's after them.
    """
    if beta <= 0:
        raise ValueError(f"beta {beta}: without a price on divergence there is no optimum to be near to")
    log_p, log_reference, scaled = log_p.double(), log_reference.double(), reward.double() / beta
    count = log_p.shape[1]
    half = count // 2
    mixture = torch.logaddexp(log_p, log_reference) - math.log(2)
    log_weight = log_reference + scaled - mixture
    total = log_weight.logsumexp(1, keepdim=True)
    # log(total - weight), kept finite where one weight is all there is
    others = total + torch.log1p(-(log_weight - total).exp().clamp(max=1 - 1e-12))
    log_z = total[:, 0] - math.log(count)
    log_z = count * log_z - (count - 1) * (others - math.log(count - 1)).mean(1)
    return log_z - (scaled - log_p + log_reference)[:, :half].mean(1)
