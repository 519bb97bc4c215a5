"""`genscale sample` for each family: its settings, and what it makes of a trained run. A new family is one line in SAMPLERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genscale.evaluation.generation import sample_text
from genscale.objectives.base import Objective


@dataclass
class TextSampling:
    """What to write."""

    prompt: str = ""
    """Text to go on from (empty: the start of a document)."""
    tokens: int = 200
    """Tokens to add at most; a text ends earlier where its document does."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this probability only."""
    seed: int = 0
    """Same seed, same text; text i depends on the seed and i alone."""
    count: int = 1
    """Texts to write."""


def sample_gpt(objective: Objective, settings: TextSampling) -> None:
    """Print the texts, each under a rule where there are several."""
    texts = sample_text(objective.networks["gpt"], objective.tokenizer, settings.prompt, tokens=settings.tokens,
                        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed,
                        count=settings.count)
    for index, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {index} of {len(texts)} ---")
        print(text)


@dataclass(frozen=True)
class Sampler:
    """A family's settings dataclass (flags of the verb) and what to do with them."""

    settings: type
    run: Callable[[Objective, Any], None]


SAMPLERS = {"gpt": Sampler(TextSampling, sample_gpt)}
