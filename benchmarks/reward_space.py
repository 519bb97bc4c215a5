"""All texts of a small space, so that the best possible policy is known exactly: p*(y) ~ p_ref(y) exp(r(y) / beta).

Three letters and the end of text, at most five tokens: 364 texts; those of five letters are cut. Each of four prompts asks
for as many a's as its number says: reward 1, else 0.
"""

from __future__ import annotations

import itertools

import genscale  # noqa: F401

import torch
from torch import Tensor

LETTERS, LONGEST, PROMPTS = 3, 5, 4
END = LETTERS
"""The token that ends a text."""
BETA = 0.25

PREFIXES = [prefix for length in range(LONGEST) for prefix in itertools.product(range(LETTERS), repeat=length)]
"""What may stand before a token."""
TEXTS = [(*prefix, END) for prefix in PREFIXES] + list(itertools.product(range(LETTERS), repeat=LONGEST))

TOKENS = torch.tensor([[*text, *[END] * (LONGEST - len(text))] for text in TEXTS])
"""`(texts, longest)`, the end of text repeated after the end."""
MASK = torch.tensor([[position < len(text) for position in range(LONGEST)] for text in TEXTS])
"""`(texts, longest)`, true up to and with the end of text."""
CUT = torch.tensor([text[-1] != END for text in TEXTS])
_NUMBER = {prefix: number for number, prefix in enumerate(PREFIXES)}
BEFORE = torch.tensor([[_NUMBER.get(text[:position], 0) if position < len(text) else 0 for position in range(LONGEST)]
                       for text in TEXTS])  # fmt: skip
"""`(texts, longest)`, the number of the prefix before each token."""
REWARD = torch.stack([((TOKENS == 0).sum(1) == prompt).double() for prompt in range(PROMPTS)])
"""`(prompts, texts)`."""


def optimum(log_reference: Tensor, reward: Tensor, beta: float = BETA) -> Tensor:
    """Log p* of every text, of log p_ref and rewards `(..., texts)`."""
    return (log_reference + reward / beta).log_softmax(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of what the probabilities `(..., texts)` differ by."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
