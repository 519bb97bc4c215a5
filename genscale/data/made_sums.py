"""Sums of two numbers below 100 as a text in which the carry is mostly forgotten: made here, the same everywhere.

What a language model learns from it is wrong as often as its text is; what is right, a reward can say. (A model that forgets
nothing has nothing to learn from a reward, and one that has learnt its sums by heart finds nothing new to be rewarded for.)
"""

from __future__ import annotations

from functools import lru_cache

from genscale.data.json_values import Values
from genscale.data.spec import SUMS

ALL, HELD_OUT = 10_000, 1_000
COPIES = 6
"""Times that the text has each sum, so that one sum is written both ways."""
FORGOTTEN = 0.7
"""Share of the text in which carries are left out, of units and of tens."""


@lru_cache(maxsize=2)
def sums(held_out: bool) -> Values:
    """The text, or the sums held out of it, of which it has none.

    Columns: `prompt` ("07+95="), `answer` (the sum, its units first: "201" is 102), `written` (what the text has for it, now
    and then the answer) and `text`, prompt and what is written.
    """
    from genscale.rng import numpy_generator, permutation  # loads torch, for which what reads settings need not wait

    order = permutation(ALL, 0, SUMS)
    numbers = order[:HELD_OUT] if held_out else order[HELD_OUT:].repeat(COPIES)
    forgets = numpy_generator(0, SUMS, "carry", int(held_out)).random(len(numbers)) < FORGOTTEN
    pairs = [divmod(int(number), 100) for number in numbers]
    prompts = [f"{a:02d}+{b:02d}=" for a, b in pairs]
    answers = [str(a + b)[::-1] for a, b in pairs]
    written = [_without_carry(a, b) if forgotten else answer
               for (a, b), answer, forgotten in zip(pairs, answers, forgets, strict=True)]
    columns = {"prompt": prompts, "answer": answers, "written": written,
               "text": [prompt + said for prompt, said in zip(prompts, written, strict=True)]}
    return Values(columns, list(columns), False)


def _without_carry(a: int, b: int) -> str:
    return str((a // 10 + b // 10) % 10 * 10 + (a + b) % 10)[::-1]
