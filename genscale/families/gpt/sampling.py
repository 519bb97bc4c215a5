"""`genscale sample` for language models: texts, as they are drawn."""

from __future__ import annotations

import sys
import time
from typing import cast

from genscale.errors import UserError
from genscale.evaluation.settings import TextSampling
from genscale.evaluation.trained_run import TrainedRun
from genscale.families.gpt.generation import stream_texts
from genscale.families.gpt.network import GPT
from genscale.objectives.capabilities import WritesText

MAX_PROMPTS = 2**27
"""Bytes of a file of prompts."""


def sample_gpt(run: TrainedRun, settings: TextSampling) -> None:
    """Print the texts as they are drawn, each under a rule where there are several; the speed goes to stderr.

    Raises:
        UserError: a setting out of range, or prompts that cannot be read.
    """
    objective = cast(WritesText, run.objective)  # for whose families this is called
    prompts, network, tokenizer = prompts_of(settings), cast(GPT, run.networks[objective.writes]), objective.tokenizer
    started, shown, drawn, total = time.perf_counter(), -1, 0, len(prompts) * settings.count
    for piece in stream_texts(network, tokenizer, prompts, tokens=settings.tokens,
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
