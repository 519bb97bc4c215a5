"""Text from a trained language model, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Unpack

from torch import Tensor

from genscale.data.text.tokenizers import Tokenizer
from genscale.errors import UserError
from genscale.families.gpt.decoding import Drawing, left_padded, stream
from genscale.families.gpt.network import GPT
from genscale.rng import torch_generator

TEXTS_AT_ONCE = 32
"""Texts that are written side by side: more would be faster still, but each holds keys and values of its own."""


class Piece(NamedTuple):
    """What came to text number `text`: `words`, drawn as `tokens` tokens (none for the prompt)."""

    text: int
    words: str
    tokens: int


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


def stream_texts(network: GPT, tokenizer: Tokenizer, prompts: Sequence[str], *, tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int = 0, count: int = 1) -> Iterator[Piece]:
    """Write `count` texts for each prompt, many side by side; yields their pieces in reading order.

    The first text comes as it is drawn, in whole characters; the next one, whatever it has by then, once that has ended.

    Args:
        network: a whole GPT on one device.
        tokenizer: the one it was trained with.
        prompts: each may be empty (a document from its start) or longer than the positions (its end is read).
        tokens: to add at most; a text ends earlier where its document does.
        temperature: below 1 is safer, above 1 wilder; 0 always takes the likeliest token.
        top_k: draw from this many likeliest tokens only.
        top_p: draw from the fewest likeliest tokens that hold this probability only.
        seed: text i of a prompt depends on the prompt, the seed and i alone: not on `count`, nor on the other prompts.
        count: texts to write for a prompt.

    Raises:
        UserError: a setting out of range.
    """
    check_sampling(tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, count=count)
    encoded = [tokenizer.encode(prompt) if prompt else [] for prompt in prompts]
    texts = len(prompts) * count
    device = next(network.parameters()).device
    for first in range(0, texts, TEXTS_AT_ONCE):
        chunk = [(encoded[text // count], text % count) for text in range(first, min(first + TEXTS_AT_ONCE, texts))]
        # A document follows the end of another, so that token is what an empty prompt stands for; it is not shown. What the
        # network cannot read of a long prompt is left out here, so that it does not widen the batch.
        starts = [ids[-network.settings.positions:] or [tokenizer.end_of_text] for ids, _ in chunk]
        padded, lengths = left_padded(starts, device)
        steps = stream(network, padded, tokens, positions=network.settings.positions, layers=network.settings.layers,
                       lengths=lengths, generators=[torch_generator(seed, "sample", i) for _, i in chunk],
                       temperature=temperature, top_k=top_k, top_p=top_p, end_of_text=tokenizer.end_of_text,
                       vocab_size=tokenizer.vocab_size)
        growing = [GrowingText(tokenizer, ids) for ids, _ in chunk]
        for row, words, drawn in _in_reading_order(growing, steps):
            yield Piece(first + row, words, drawn)


def sample_text(network: GPT, tokenizer: Tokenizer, prompt: str, *, tokens: int, seed: int = 0, count: int = 1,
                **drawing: Unpack[Drawing]) -> list[str]:
    """`count` texts that begin with `prompt` and go on as the network thinks likely; arguments as of `stream_texts`."""
    texts = [""] * max(count, 0)
    for piece in stream_texts(network, tokenizer, [prompt], tokens=tokens, seed=seed, count=count, **drawing):
        texts[piece.text] += piece.words
    return texts


class GrowingText:
    """A text that is read while its tokens come.

    Args:
        tokenizer: decodes it.
        ids: what is there at the start.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._ids = tokenizer, list(ids)
        self._drawn, self._counted = 0, 0
        # Tokens [context, read) were shown last. They are decoded again with the new ones, for many tokenizers treat a word
        # at the start of a text (its space, say) differently, and dropped from what that gives.
        self._context, self._read = 0, 0
        self.ended = False

    def add(self, token: int) -> None:
        """One more token; the end of text ends it, and what comes after that does not count."""
        if self.ended:
            return
        self._drawn += 1
        self.ended = token == self._tokenizer.end_of_text
        if not self.ended:
            self._ids.append(token)

    def take(self, last: bool = False) -> tuple[str, int]:
        """What came since the last time: words, and the number of tokens drawn for them. The bytes of a character that is not
        yet whole wait, unless this is the `last` time."""
        shown = self._tokenizer.decode(self._ids[self._context:self._read])
        words = self._tokenizer.decode(self._ids[self._context:])[len(shown):]
        if words.endswith("\N{REPLACEMENT CHARACTER}") and not (last or self.ended):
            return "", 0
        if words:
            self._context, self._read = self._read, len(self._ids)
        drawn, self._counted = self._drawn - self._counted, self._drawn
        return words, drawn


def _in_reading_order(texts: Sequence[GrowingText], steps: Iterable[Tensor]) -> Iterator[tuple[int, str, int]]:
    """(row, words, tokens) of texts that all grow by one token a step `(batch,)`: one text after the other."""
    current = 0
    # Nothing is added in the first turn: the first prompt shows before the network has read it.
    for drawn in chain([[]], (step.tolist() for step in steps)):
        for text, token in zip(texts, drawn, strict=False):
            text.add(token)
        while current < len(texts):
            words, count = texts[current].take()
            if words or count:
                yield current, words, count
            if not texts[current].ended:
                break
            current += 1
    for row in range(current, len(texts)):
        words, count = texts[row].take(last=True)
        if words or count:
            yield row, words, count
