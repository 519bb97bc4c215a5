"""Answers to prompts, drawn from numbers that have an address, and what they are worth to the loss: their log-probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.families.gpt.attention import KeyValueCache
from genscale.families.gpt.decoding import growing
from genscale.objectives.base import Rollout


@dataclass(frozen=True)
class Prompts:
    """Prompts of any lengths, each at the right end of its row.

    Attributes:
        tokens: int64 `(batch, width)`; 0 before a prompt.
        documents: int64 of the same shape, 0 before a prompt and 1 in it; None where every prompt fills its row. What stands
            before a prompt is a document of its own: no token of the prompt sees it, and positions begin with the prompt.
    """

    tokens: Tensor
    documents: Tensor | None

    @staticmethod
    def of(padded: Tensor, whole: bool = False) -> Prompts:
        """The prompts of `(batch, prompt_tokens)` with -1 before each: in rows as long as the longest, or (`whole`) as they
        are."""
        present = padded >= 0
        if not whole:
            width = int(present.sum(1).max())
            padded, present = padded[:, -width:], present[:, -width:]
        alone = not whole and bool(present.all())
        return Prompts(padded.clamp(min=0), None if alone else present.long())

    def repeated(self, times: int) -> Prompts:
        """Each of them so many times, one after the other."""
        documents = None if self.documents is None else self.documents.repeat_interleave(times, 0)
        return Prompts(self.tokens.repeat_interleave(times, 0), documents)


@dataclass(frozen=True)
class Answers:
    """What was written.

    Attributes:
        tokens: int64 `(answers, time)`, up to the longest; after the end of text, that again.
        mask: bool of the same shape: up to and with the end of text.
        ended: bool `(answers,)`: it ended, and was not cut.
    """

    tokens: Tensor
    mask: Tensor
    ended: Tensor


class Writer:
    """Writes answers, and says how probable they are.

    Args:
        layers: blocks of the network.
        vocab_size: tokens that there are; rows of the embedding table beyond are never drawn, and have no probability.
        end_of_text: the token that ends an answer.
        tokens: of the longest answer.
    """

    def __init__(self, layers: int, vocab_size: int, end_of_text: int, tokens: int) -> None:
        self.layers, self.vocab_size, self.end_of_text, self.tokens = layers, vocab_size, end_of_text, tokens

    @torch.no_grad()
    def write(self, rollout: Rollout, prompts: Prompts, uniforms: Tensor | None, group: int = 1,
              never_end: bool = False) -> Answers:
        """`group` answers to each prompt.

        Args:
            uniforms: `(prompts x group, tokens)` in [0, 1), which a token is drawn by; None: the likeliest token each time.
            never_end: every answer is as long as it can be.
        """
        cache = KeyValueCache(self.layers, prompts.tokens.shape[1] + self.tokens)
        end = -1 if never_end else self.end_of_text
        documents, read = prompts.documents, prompts.tokens
        tokens, mask = [], []
        ended = torch.zeros(len(read) * group, dtype=torch.bool, device=read.device)
        with growing(rollout.network)():
            for turn in range(self.tokens):
                if turn > 0 and not rollout.goes_on(never_end or not bool(ended.all())):
                    break
                logits = rollout.network(read, cache=cache, documents=documents, last=1)[:, -1, : self.vocab_size]
                if turn == 0:  # read once, and gone on from as often as there are answers
                    cache.repeat(group)
                    logits = logits.repeat_interleave(group, 0)
                chosen = drawn(logits, uniforms[:, turn]) if uniforms is not None else logits.float().argmax(-1)
                chosen = chosen.masked_fill(ended, self.end_of_text)
                tokens.append(chosen)
                mask.append(~ended)
                ended = ended | (chosen == end)
                read = chosen[:, None]
                documents = None if prompts.documents is None else torch.ones_like(read)
        return Answers(torch.stack(tokens, 1), torch.stack(mask, 1), ended)

    def logits(self, network: nn.Module, prompts: Prompts, answers: Answers) -> Tensor:
        """Of the tokens of the answers, fp32 `(answers, time, vocab_size)`."""
        time = answers.tokens.shape[1]
        tokens = torch.cat([prompts.tokens, answers.tokens], 1)[:, :-1]
        documents = None if prompts.documents is None else F.pad(prompts.documents, (0, time - 1), value=1)
        return network(tokens, documents=documents, last=time)[..., : self.vocab_size].float()


def drawn(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `(rows,)` of logits `(rows, vocab_size)` by uniforms in [0, 1): where the cumulated probability passes them. In
    fp64, so that which token it is hardly ever hangs on how the logits were rounded."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    wanted = uniforms[:, None].double() * cumulated[:, -1:]  # less than the last, which rounding may keep from 1
    return torch.searchsorted(cumulated, wanted, right=True)[:, 0]


def log_probability(logits: Tensor, answers: Answers) -> Tensor:
    """Nats `(answers,)` of whole answers, up to and with their end of text; of one that was cut, up to there."""
    nats = F.cross_entropy(logits.flatten(0, 1), answers.tokens.flatten(), reduction="none").view_as(answers.tokens)
    return -(nats * answers.mask).sum(1)


@torch.no_grad()
def entropy(logits: Tensor, answers: Answers) -> Tensor:
    """Nats `(answers,)`: of the choice of each token, added up over an answer."""
    log_p = logits.log_softmax(-1)
    return -((log_p.exp() * log_p).sum(-1) * answers.mask).sum(1)
