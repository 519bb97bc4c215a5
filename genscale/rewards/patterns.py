"""Rewards that hold an answer against a pattern, in bounded time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import regex

from genscale.errors import UserError
from genscale.rewards.base import Answer, TextReward

LONGEST = 2000
"""Characters of a pattern."""
MOST_REPEATS = 100_000
"""Product of all the counts in a pattern: `((a{999}){999}){999}` would take hours and gigabytes to be read."""
_COUNT = regex.compile(r"\{(?:[0-9]*,)?([0-9]+)\}|\{([0-9]+),\}")


def compiled(pattern: str, key: str) -> regex.Pattern[str]:
    """A pattern, read in bounded time. Raises UserError, which begins with `key`."""
    if len(pattern) > LONGEST:
        raise UserError(f"{key}: has {len(pattern):,} characters; at most {LONGEST:,} are read")
    counts = [int((found[1] or found[2])[:9]) for found in _COUNT.finditer(pattern)]
    if math.prod(max(1, count) for count in counts) > MOST_REPEATS:
        raise UserError(f"{key}: {pattern!r:.80} repeats what it repeats; the product of its counts may be {MOST_REPEATS:,} at "
                        "most; use * or +")
    try:
        return regex.compile(pattern)
    except RecursionError:
        raise UserError(f"{key}: {pattern!r:.80} is nested too deep; make it simpler") from None
    except (regex.error, OverflowError) as error:
        raise UserError(f"{key}: {pattern!r:.80} is no regular expression ({error})") from None


def matches(pattern: regex.Pattern[str], text: str, key: str, seconds: float, whole: bool = False) -> bool:
    """Whether a text matches, in whole or a part of it, in bounded CPU time.

    Raises:
        UserError: it takes longer, or goes around in itself (`(?R)`) without end; the message begins with `key`.
    """
    match = pattern.fullmatch if whole else pattern.search
    advice = ("it backtracks; write it so that no part can match the same text in two ways, or with possessive quantifiers "
              "(a++)")
    try:
        return match(text, timeout=seconds) is not None
    except TimeoutError:
        why = f"took more than {seconds:g} seconds"
    except MemoryError:
        why, advice = "took more memory than a pattern may", "it calls itself, or backtracks, without end"
    raise UserError(f"{key}: {pattern.pattern!r:.80} {why} for a text of {len(text):,} characters: {advice}")


@dataclass(frozen=True)
class PatternSettings:
    """The pattern, and where it is looked for."""

    pattern: str
    """A regular expression, as of Python's `re`."""
    where: Literal["whole", "anywhere"] = "whole"
    """whole: the whole answer is to match, anywhere: a part of it."""
    seconds: float = 2.0
    """CPU time that the pattern may take for one answer; a run in which it takes longer ends, by name."""

    def __post_init__(self) -> None:
        compiled(self.pattern, "pattern")
        if not 0 < self.seconds <= 60:
            raise UserError(f"seconds: must be above 0 and at most 60, not {self.seconds:g}")


class Pattern(TextReward):
    """1 where the answer matches a regular expression, else 0.

    A pattern that takes too long ends the run: to give 0 would make the run depend on how busy the machine is.

    >>> reward = Pattern(PatternSettings("[0-9]+"))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("42", "42!")])
    [1.0, 0.0]
    """

    settings = PatternSettings

    def __init__(self, asked: PatternSettings) -> None:
        super().__init__(asked)
        self._pattern = compiled(asked.pattern, "pattern")

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises UserError where the pattern takes too long."""
        return [float(self._matches(answer)) for answer in answers]

    def _matches(self, answer: Answer) -> bool:
        try:
            return matches(self._pattern, answer.text, "pattern", self.asked.seconds, whole=self.asked.where == "whole")
        except UserError as error:
            raise UserError(f"{error} (sample {answer.sample:,}, answer {answer.member})") from None
