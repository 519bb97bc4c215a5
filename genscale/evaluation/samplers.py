"""`genscale sample` for each family: its settings, and what it makes of a trained run. A new family is one line in SAMPLERS."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genscale.errors import UserError
from genscale.evaluation.generation import stream_texts
from genscale.evaluation.image_sampling import ImageSampling, sample_images
from genscale.evaluation.point_sampling import PointSampling, sample_points
from genscale.evaluation.trained_run import TrainedRun

MAX_PROMPTS = 2**27
"""Bytes of a file of prompts."""


@dataclass
class TextSampling:
    """What to write."""

    prompt: str = ""
    """Text to go on from (empty: the start of a document)."""
    prompts: str | None = None
    """File of prompts, one a line (blank lines are skipped), written many side by side."""
    tokens: int = 200
    """Tokens to add at most; a text ends earlier where its document does."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this probability only."""
    seed: int = 0
    """Same seed, same text; text i of a prompt depends on the prompt, the seed and i alone."""
    count: int = 1
    """Texts to write (with prompts: for each)."""


def sample_gpt(run: TrainedRun, settings: TextSampling) -> None:
    """Print the texts as they are drawn, each under a rule where there are several; the speed goes to stderr.

    Raises:
        UserError: a setting out of range, or prompts that cannot be read.
    """
    prompts, objective = prompts_of(settings), run.objective
    started, shown, drawn, total = time.perf_counter(), -1, 0, len(prompts) * settings.count
    for piece in stream_texts(objective.networks["gpt"], objective.tokenizer, prompts, tokens=settings.tokens,
                              temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p,
                              seed=settings.seed, count=settings.count):
        if piece.text != shown:
            print("\n" * (shown >= 0) + (f"--- {piece.text + 1} of {total} ---\n" if total > 1 else ""), end="")
            shown = piece.text
        print(piece.words, end="", flush=True)
        drawn += piece.tokens
    print(flush=True)
    seconds = time.perf_counter() - started
    print(f"{drawn:,} tokens in {seconds:.3f} s, {drawn / seconds:,.0f} tokens/s", file=sys.stderr)


def prompts_of(settings: TextSampling) -> list[str]:
    """What to go on from. Raises UserError."""
    if settings.prompts is None:
        try:
            settings.prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no characters
            raise UserError(f"prompt: {settings.prompt[:80]!r} is not UTF-8 from character {error.start + 1} on; give it as "
                            "UTF-8") from None
        return [settings.prompt]
    if settings.prompt:
        raise UserError(f"prompts: {settings.prompts} and prompt '{settings.prompt}' are both given; leave one out")
    if not settings.prompts:
        raise UserError("prompts: '' names no file; give a UTF-8 file of one prompt a line, or leave it out")
    try:
        with open(settings.prompts, "rb") as file:  # of a pipe too, as `<(command)` is
            content = file.read(MAX_PROMPTS + 1)
        if len(content) > MAX_PROMPTS:
            raise UserError(f"prompts: {settings.prompts} has more than the {MAX_PROMPTS:,} bytes that are read of prompts")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {settings.prompts} cannot be read ({getattr(error, 'strerror', None) or error}); give a "
                        "UTF-8 file of one prompt a line") from None
    # Not splitlines, which also ends a line at a form feed, U+2028 and others that may stand in a text.
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"prompts: {settings.prompts} holds no prompt; give a file of one prompt a line, or use --prompt")
    return prompts


@dataclass(frozen=True)
class Sampler:
    """A family's settings dataclass (flags of the verb) and what to do with them."""

    settings: type
    run: Callable[[TrainedRun, Any], None]


IMAGES = Sampler(ImageSampling, sample_images)
SAMPLERS = {"gpt": Sampler(TextSampling, sample_gpt), "dcgan": IMAGES, "vae": IMAGES, "vae_gan": IMAGES,
            "points": Sampler(PointSampling, sample_points)}
