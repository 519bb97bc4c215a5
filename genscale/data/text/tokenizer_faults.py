"""What can be wrong with a `tokenizer.json` of a stranger's, and what its steps do to the beginning of a text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

from genscale.data.text.tokenizer_companions import LARGEST_ID
from genscale.errors import UserError

PROBES = ("Hello, world! 12,345.67 it's\n\n  x", *(letter * 64 + end for letter in "aAé1- \n" for end in ("", "!")))
"""Texts on which a pattern shows whether it takes forever."""
GROWTH = 1000
"""Times as long as a text that a normalizer may make it."""


def check_content(content: Mapping[str, Any], vocabulary: Mapping[str, int], name: str) -> int:
    """The largest id of a tokenizer.

    Args:
        content: of its `tokenizer.json`.
        name: of the tokenizer, for messages.

    Raises:
        UserError: it has ids or steps with which nothing can be trained.
    """
    word, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if largest >= LARGEST_ID:
        raise UserError(f"data.tokenizer={name}: the token {word[:40]!r} has the id {largest}, of {len(vocabulary)} "
                        f"tokens; ids below {LARGEST_ID} are taken: number them one after the other")
    if content["model"].get("dropout"):
        raise UserError(f"data.tokenizer={name}: has dropout={content['model']['dropout']}, with which a text is "
                        "other tokens each time it is read; set dropout to null in its model")
    if (times := _growth(content.get("normalizer"))) > GROWTH:
        raise UserError(f"data.tokenizer={name}: its normalizer makes a text up to {times} times as long, more than "
                        f"{GROWTH}; mend its Replace steps")
    return largest


@contextmanager
def reported(what: str, advice: str) -> Iterator[None]:
    """The library's errors, and the panics of its Rust, as the user's."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise UserError(f"{what} ({str(error)[:200]}); {advice}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """While a panic would print its own lines: the error says it."""
    try:
        before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no standard error
        yield
        return
    try:
        sys.stderr.flush()
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts nothing before a text."""
    if step is None or step.get("type") == "Prepend":
        return None
    if step.get("type") in ("Metaspace", "ByteLevel"):
        never = {"add_prefix_space": False, "prepend_scheme": "never"}
        return {key: never.get(key, value) for key, value in step.items()}
    for steps in ("normalizers", "pretokenizers"):
        if steps in step:
            return {**step, steps: [part for part in map(without_prefix, step[steps]) if part is not None]}
    return step


def _growth(step: dict[str, Any] | None) -> int:
    """Times as long as a text that a normalizer may make it, at most."""
    if step is None:
        return 1
    own = len(step.get("content") or "") if step.get("type") == "Replace" else 1
    return prod([max(1, own), *map(_growth, step.get("normalizers", []))])
