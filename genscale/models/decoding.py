"""Drawing text from a language model, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits `(batch, vocab_size)` with all but the likeliest tokens at minus infinity.

    Args:
        logits: already divided by the temperature.
        top_k: keep this many (Fan et al. 2018), more where the last ones are equal.
        top_p: then keep the fewest of the likeliest that hold at least this probability (Holtzman et al. 2020, nucleus).
    """
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not filled the nucleus; before the likeliest there is nothing.
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row `(batch,)` for logits `(batch, vocab_size)`; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)])


@torch.no_grad()
def generate(network: nn.Module, tokens: Tensor, max_new_tokens: int, *, positions: int, generators: Sequence[torch.Generator],
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, end_of_text: int | None = None,
             vocab_size: int | None = None) -> Tensor:
    """Continue prompts by up to `max_new_tokens` tokens; the whole window is computed anew for each.

    Args:
        network: a language model, wrapped or not: tokens `(batch, time)` to logits `(batch, time, vocab_size)`.
        tokens: `(batch, time)` int64 prompts, all of the same length, at least one token.
        positions: longest sequence the network reads; a longer one slides, its oldest tokens forgotten.
        generators: one CPU generator a row, so that a row does not depend on how many stand beside it.
        temperature: divides the logits; 0 is greedy.
        top_k, top_p: see `filter_logits`.
        end_of_text: a row that drew it is filled up with it, and all stop once every row has. None: never stop early.
        vocab_size: tokens from here on are padding of the embedding table and are never drawn.

    Returns:
        `(batch, time + new)` int64 on the device of `tokens`.
    """
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    was_training = network.training
    network.eval()
    try:
        for _ in range(max_new_tokens):
            # Chosen on the CPU, in fp32, so that the draws are the same ones whatever the device.
            logits = network(tokens[:, -positions:])[:, -1, :vocab_size].float().cpu()
            drawn = choose(logits, temperature, top_k, top_p, generators)
            if end_of_text is not None:
                drawn = drawn.masked_fill(finished, end_of_text)
                finished |= drawn == end_of_text
            tokens = torch.cat([tokens, drawn[:, None].to(tokens.device)], dim=1)
            if finished.all():
                break
    finally:
        network.train(was_training)
    return tokens
