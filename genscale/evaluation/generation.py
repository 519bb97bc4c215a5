"""Text from a trained language model, for people to read."""

from __future__ import annotations

import torch

from genscale.data.tokenizers import Tokenizer
from genscale.errors import UserError
from genscale.models.decoding import generate
from genscale.models.gpt import GPT
from genscale.rng import torch_generator


def check_sampling(*, tokens: int, temperature: float, top_k: int | None, top_p: float | None, count: int) -> None:
    """Raise UserError for settings that no text can be drawn with."""
    for name, value in (("tokens", tokens), ("count", count), ("top_k", top_k)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} is less than one; the nearest allowed value is 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature: {temperature} is not a finite number from 0 up; the nearest allowed value is "
                        f"{'1 (the model as it is)' if temperature > 0 else '0 (always the likeliest token)'}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not a share above 0 and up to 1; the nearest allowed value is "
                        f"{0.01 if top_p <= 0 else 1}")


def sample_text(network: GPT, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float = 1.0,
                top_k: int | None = None, top_p: float | None = None, seed: int = 0, count: int = 1) -> list[str]:
    """Texts that begin with `prompt` and go on as the network thinks likely.

    Args:
        network: a whole GPT on one device.
        tokenizer: the one it was trained with.
        prompt: may be empty (a document from its start) or longer than the positions (its end is read).
        tokens: to add at most; a text ends earlier where its document does.
        temperature: below 1 is safer, above 1 wilder; 0 always takes the likeliest token.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that hold this probability only.
        seed: text i depends on the seed and i alone, not on `count`.
        count: texts to write.

    Raises:
        UserError: a setting out of range.
    """
    check_sampling(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, count=count)
    # A document follows the end of another, so that token is what an empty prompt stands for; it is not shown.
    ids = tokenizer.encode(prompt) if prompt else []
    start = ids or [tokenizer.end_of_text]
    device = next(network.parameters()).device
    rows = generate(network, torch.tensor([start] * count, device=device), tokens, positions=network.settings.positions,
                    generators=[torch_generator(seed, "sample", i) for i in range(count)], temperature=temperature,
                    top_k=top_k, top_p=top_p, end_of_text=tokenizer.end_of_text, vocab_size=tokenizer.vocab_size)
    return [tokenizer.decode(ids + _until(row[len(start):].tolist(), tokenizer.end_of_text)) for row in rows]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[:ids.index(end)] if end in ids else ids
