"""Rewards that look at an answer as a plain text."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genscale.errors import UserError
from genscale.rewards.base import Answer, TextReward


def column_of(answer: Answer, column: str) -> Any:
    """What the prompt's row has in a column. Raises UserError where there is none."""
    if column not in answer.row or answer.row[column] is None:
        there = ", ".join(map(str, answer.row)) or "none"
        raise UserError(f"column: '{column}' is not in the row of sample {answer.sample:,} (its columns: {there})")
    return answer.row[column]


def _plain(text: str, strip: bool, casefold: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if casefold else text


@dataclass(frozen=True)
class ExactSettings:
    """How an answer is compared with the right one."""

    column: str = "answer"
    """Column of the prompt's row that holds the right answer; a list there is of several right ones."""
    strip: bool = True
    """White space around either is no matter."""
    casefold: bool = False
    """Capital and small letters are alike."""


class RightOrWrong(TextReward):
    """1 where an answer is right by a column of the data, `column` of the settings, else 0."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of what is right."""
        return (self.asked.column,)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        return [float(self._is_right(answer)) for answer in answers]

    @abstractmethod
    def _is_right(self, answer: Answer) -> bool:
        """Whether it is."""

    def _right_number(self, answer: Answer) -> float:
        """The last number in the column. Raises UserError where there is none."""
        right = last_number(str(column_of(answer, self.asked.column)))
        if right is None:
            raise UserError(f"column: '{self.asked.column}' holds no number in the row of sample {answer.sample:,}")
        return right


class Exact(RightOrWrong):
    """1 where the answer is the one in a column of the data, else 0.

    >>> reward = Exact(ExactSettings())
    >>> reward.judge([Answer("2+2=", text, {"answer": 4}, True, 0, 0) for text in ("4", " 4 ", "5")])
    [1.0, 1.0, 0.0]
    """

    settings = ExactSettings

    def _is_right(self, answer: Answer) -> bool:
        right = column_of(answer, self.asked.column)
        rights = right if isinstance(right, (list, tuple)) else [right]
        said = _plain(answer.text, self.asked.strip, self.asked.casefold)
        return said in [_plain(str(each), self.asked.strip, self.asked.casefold) for each in rights]


@dataclass(frozen=True)
class OneOfSettings:
    """Which answers are wished for."""

    labels: list[str]
    """The texts that are rewarded."""
    strip: bool = True
    """White space around an answer is no matter."""
    casefold: bool = False
    """Capital and small letters are alike."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise UserError("labels: names none; give the texts that are rewarded, as ['yes', 'no']")


class OneOf(TextReward):
    """1 where the answer is one of some texts, else 0.

    >>> reward = OneOf(OneOfSettings(["yes", "no"], casefold=True))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("Yes", "maybe")])
    [1.0, 0.0]
    """

    settings = OneOfSettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        labels = {_plain(label, self.asked.strip, self.asked.casefold) for label in self.asked.labels}
        return [float(_plain(answer.text, self.asked.strip, self.asked.casefold) in labels) for answer in answers]


@dataclass(frozen=True)
class NumericSettings:
    """How a number is compared with the right one."""

    column: str = "answer"
    """Column of the prompt's row whose last number is the right one."""
    tolerance: float = 0.0
    """Difference from the right number that is still right."""
    relative: float = 0.0
    """The same as a share of the right number."""

    def __post_init__(self) -> None:
        for name in ("tolerance", "relative"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: must be at least 0, not {getattr(self, name)}")


# An ASCII number, with commas between thousands or without; a sign only where no digit or letter stands before it.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
                     r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?")


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none, or one that is larger than a float holds.

    >>> [last_number(text) for text in ("so it is 1,234.5", "3-4", "x = -2", "none", "1e3")]
    [1234.5, 4.0, -2.0, None, 1000.0]
    """
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "")) if found else math.inf
    return number if math.isfinite(number) else None


class Numeric(RightOrWrong):
    """1 where the last number of the answer is the right one, else 0.

    >>> reward = Numeric(NumericSettings(tolerance=0.01))
    >>> reward.judge([Answer("1/3?", text, {"answer": "#### 0.333"}, True, 0, 0) for text in ("about 0.33", "0.3", "a third")])
    [1.0, 0.0, 0.0]
    """

    settings = NumericSettings

    def _is_right(self, answer: Answer) -> bool:
        said, right = last_number(answer.text), self._right_number(answer)
        return said is not None and math.isclose(said, right, rel_tol=self.asked.relative, abs_tol=self.asked.tolerance)


@dataclass(frozen=True)
class LengthSettings:
    """How long an answer is to be."""

    target: int
    """The length that is wished for."""
    tolerance: int = 0
    """What is so near the target is as good."""
    unit: Literal["characters", "words"] = "characters"
    """What is counted."""

    def __post_init__(self) -> None:
        for name in ("target", "tolerance"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: must be at least 0, not {getattr(self, name)}")


class Length(TextReward):
    """0 where the answer is as long as wished, less by its distance from that as a share of the wished length, at least -1.

    >>> reward = Length(LengthSettings(4))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("four", "two", "much too long")])
    [0.0, -0.25, -1.0]
    """

    settings = LengthSettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """From -1 to 0."""
        lengths = [len(answer.text.split()) if self.asked.unit == "words" else len(answer.text) for answer in answers]
        off = [max(0, abs(length - self.asked.target) - self.asked.tolerance) for length in lengths]
        return [0.0 - min(1.0, each / max(1, self.asked.target)) for each in off]


@dataclass(frozen=True)
class RepetitionSettings:
    """What counts as said again."""

    n: int = 3
    """Words, or characters, of a piece."""
    unit: Literal["words", "characters"] = "words"
    """What a piece is of."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n: must be at least 1, not {self.n}")


class Repetition(TextReward):
    """Minus the share of pieces of n words that the answer has said before: 0 where nothing is repeated.

    >>> reward = Repetition(RepetitionSettings(n=2))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("a b c", "a b a b a", "a")])
    [0.0, -0.5, 0.0]
    """

    settings = RepetitionSettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """From -1 to 0."""
        return [0.0 - self._share(answer.text) for answer in answers]

    def _share(self, text: str) -> float:
        units: Sequence[str] = text.split() if self.asked.unit == "words" else text
        pieces = [tuple(units[start : start + self.asked.n]) for start in range(len(units) - self.asked.n + 1)]
        return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0
