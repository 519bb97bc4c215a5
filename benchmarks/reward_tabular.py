"""A policy without limits, one row of logits a prefix, trained by genscale's own loss and by what others do instead.

Texts are drawn from the policy's own probabilities of all texts (reward_space.py). The tables of all seeds and prompts are
trained side by side: Adam is elementwise, so they do not know of each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genscale.objectives.policy_gradient import gap_to_optimum, leave_one_out, policy_loss
from reward_space import (
    BEFORE,
    BETA,
    CUT,
    END,
    LETTERS,
    LONGEST,
    MASK,
    PREFIXES,
    PROMPTS,
    REWARD,
    TOKENS,
    divergence,
    optimum,
    total_variation,
)

import torch
from torch import Tensor

GROUP = 8
LR = 0.1


@dataclass
class Written:
    """Texts in groups: `(groups, group)` by text, `(groups, group, longest)` by token.

    Attributes:
        policy: log p of each token under the policy, with gradients.
        sampler: the same under what drew it, without.
        reference: the same under the reference.
        rows, reference_rows: log p of all four tokens that might have stood there.
        mask: which tokens belong to the text.
        ends: which of them is the end of text.
        cut: which texts have none.
    """

    policy: Tensor
    sampler: Tensor
    reference: Tensor
    rows: Tensor
    reference_rows: Tensor
    mask: Tensor
    ends: Tensor
    cut: Tensor
    reward: Tensor


def k1(written: Written) -> Tensor:
    return written.policy - written.reference


def k3(written: Written) -> Tensor:
    """Schulman's estimator, which is never negative."""
    apart = written.reference - written.policy
    return apart.exp() - 1 - apart


def k3_times_ratio(written: Written) -> Tensor:
    """Weighted by the policy over what it was when it wrote: 1, but with a gradient."""
    return (written.policy - written.policy.detach()).exp() * k3(written)


def whole_vocabulary(written: Written) -> Tensor:
    """The divergence at each prefix that was reached, of all that might have come next."""
    return (written.rows.exp() * (written.rows - written.reference_rows)).sum(-1)


@dataclass(frozen=True)
class Variant:
    """How a policy is trained, where it is not genscale's way.

    Attributes:
        term: the divergence as a term of the loss; None: inside the reward.
        deviation: advantages are divided by the deviation of their group.
        length: what a text adds is divided by its length.
        attached: gradients flow through the advantage, too.
        without_end: the end of text is left out of log p.
        without_cut: texts that were cut add nothing.
        temperature: of what draws the texts.
        sampler: the divergence inside the reward is that of what drew the texts.
        updates: of the policy that one sampler writes for.
    """

    term: Callable[[Written], Tensor] | None = None
    deviation: bool = False
    length: bool = False
    attached: bool = False
    without_end: bool = False
    without_cut: bool = False
    temperature: float = 1.0
    sampler: bool = False
    updates: int = 1

    def loss(self, written: Written) -> Tensor:
        mask = written.mask & ~written.ends if self.without_end else written.mask
        log_p, reference = ((values * mask).sum(-1) for values in (written.policy, written.reference))
        value = written.reward
        if self.term is None:
            payer = (written.sampler * mask).sum(-1) if self.sampler else log_p
            value = value - BETA * ((payer if self.attached else payer.detach()) - reference)
        advantage = leave_one_out(value)
        if self.deviation:
            advantage = advantage / (value.std(1, keepdim=True) + 1e-4)
        each = -advantage * log_p
        if self.term is not None:
            each = each + BETA * (self.term(written) * mask).sum(-1)
        if self.length:
            each = each * LONGEST / 2 / mask.sum(-1).clamp(min=1)
        return (each * ~written.cut if self.without_cut else each).sum()


class Genscale(Variant):
    """What genscale trains with."""

    def loss(self, written: Written) -> Tensor:
        log_p, reference = ((values * written.mask).sum(-1) for values in (written.policy, written.reference))
        return policy_loss(log_p, reference, written.reward, BETA)["loss"]


GENSCALE = "genscale"
VARIANTS = {
    GENSCALE: Genscale(),
    "divided by the length": Variant(length=True),
    "divided by the group's deviation": Variant(deviation=True),
    "sampler 16 updates old": Variant(updates=16),
    "GRPO as published (deviation, length, k3 in the loss)": Variant(k3, deviation=True, length=True),
    "Dr. GRPO with k3 in the loss": Variant(k3),
    "k3 x ratio in the loss": Variant(k3_times_ratio),
    "whole vocabulary's divergence in the loss": Variant(whole_vocabulary),
    "k1 in the loss": Variant(k1),
    "advantage not detached": Variant(attached=True),
    "end of text outside log p": Variant(without_end=True),
    "cut texts dropped": Variant(without_cut=True),
    "temperature 0.7, divergence by the policy's own log p": Variant(temperature=0.7),
    "temperature 0.7, divergence by the sampler's log p": Variant(temperature=0.7, sampler=True),
}


class Tables:
    """Policies of `seeds` references for each prompt, which begin as their references.

    Attributes:
        logits: `(tables, prefixes, tokens)`.
        log_reference: `(tables, texts)`.
        optimum: log p* of the same.
    """

    def __init__(self, seeds: int) -> None:
        numbers = [1000 + 10 * seed + prompt for seed in range(seeds) for prompt in range(PROMPTS)]
        shape = (len(PREFIXES), LETTERS + 1)
        self.reference = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.double)
                                      for number in numbers])
        self.logits = self.reference.clone().requires_grad_()
        self.reward = REWARD.repeat(seeds, 1)
        self.log_reference = log_texts(self.reference)
        self.optimum = optimum(self.log_reference, self.reward)

    def write(self, sampler: Tensor, texts: int, generator: torch.Generator) -> Written:
        """Texts drawn by another's logits, the same number by each."""
        drawn = torch.multinomial(log_texts(sampler).exp(), texts, replacement=True, generator=generator)
        table, text = torch.arange(len(drawn)).repeat_interleave(texts).view(-1, GROUP), drawn.view(-1, GROUP)
        tokens, mask = TOKENS[text], MASK[text]

        def rows(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1)[table[..., None], BEFORE[text]]

        policy, drew, reference = rows(self.logits), rows(sampler), rows(self.reference)
        written = (each.gather(-1, tokens[..., None])[..., 0] for each in (policy, drew, reference))
        return Written(*written, policy, reference, mask, mask & (tokens == END), CUT[text], self.reward[table, text])

    def distance(self) -> Tensor:
        """Total variation of each table to its optimum."""
        return total_variation(log_texts(self.logits.detach()), self.optimum)


def log_texts(logits: Tensor) -> Tensor:
    """Log p of every text `(tables, texts)`."""
    return (logits.log_softmax(-1)[:, BEFORE, TOKENS] * MASK).sum(-1)


def train(variant: Variant, seeds: int, steps: int, texts: int) -> Tables:
    """Adam with a learning rate that falls to nothing, `texts` a table in each step."""
    tables, generator = Tables(seeds), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([tables.logits], lr=LR, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        if step % variant.updates == 0:
            sampler = tables.logits.detach() / variant.temperature  # a copy
        optimizer.zero_grad()
        (variant.loss(tables.write(sampler, texts, generator)) / texts).backward()
        optimizer.step()
    return tables


def measure(name: str, seeds: int, steps: int, texts: int) -> dict[str, Any]:
    """Total variation by seed, the mean over prompts, and what is left to gain in nats."""
    began = time.perf_counter()
    tables = train(VARIANTS[name], seeds, steps, texts)
    seconds, distance = time.perf_counter() - began, tables.distance()
    log_p = log_texts(tables.logits.detach())
    return {"variant": name, "total_variation": by_seed(distance, seeds),
            "largest_of_a_prompt": round(distance.max().item(), 4), "seconds": round(seconds, 1),
            **gaps(log_p, tables.log_reference, tables.reward, seeds)}


def by_seed(values: Tensor, seeds: int) -> list[float]:
    return [round(value, 4) for value in values.view(seeds, -1).mean(1).tolist()]


def gaps(log_p: Tensor, log_reference: Tensor, reward: Tensor, seeds: int, texts: int = 4096) -> dict[str, Any]:
    """KL(p || p*) of `(seeds x prompts, all texts)`: exactly, and as genscale estimates it of that many texts of each."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.cat([torch.multinomial(each.exp(), texts, replacement=True, generator=generator)
                       for each in (log_p, log_reference)], 1)  # fmt: skip
    estimate = gap_to_optimum(*(each.gather(1, drawn) for each in (log_p, log_reference, reward)), BETA)
    exact = divergence(log_p, optimum(log_reference, reward))
    return {"gap": by_seed(exact, seeds), "estimated_gap": by_seed(estimate, seeds)}
