"""A reward for sums that come out: an expression is read by a parser of its own, and never run as code."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from genscale.errors import UserError
from genscale.rewards.base import Answer
from genscale.rewards.texts import RightOrWrong, column_of

LONGEST = 1000
"""Characters of an expression; a longer one has no value."""
DEEPEST = 50
"""Brackets in each other."""
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\*\*|//|[-+*/%()]))")


class _NoValue(Exception):
    pass


def value_of(expression: str) -> float | None:
    """The value of an expression of numbers, + - * / // % ** and brackets; None where it is something else, divides by zero, or
    is larger than a number holds.

    >>> [value_of(text) for text in ("2 + 3*4", "(1-3)**2 / 8", "7 // 2", "1/0", "__import__('os')", "9**9**9**9", "2 3")]
    [14.0, 0.5, 3.0, None, None, None, None]
    """
    try:
        return _Expression(expression).value()
    except (_NoValue, ZeroDivisionError, OverflowError):
        return None


class _Expression:
    """Recursive descent; the precedence is Python's."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise _NoValue
        self._tokens: list[str] = []
        at, text = 0, text.strip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found:
                raise _NoValue
            self._tokens.append(found[1] or found[2])
            at = found.end()
        self._at = self._depth = 0

    def value(self) -> float:
        value = self._sum()
        if self._at < len(self._tokens) or not math.isfinite(value):
            raise _NoValue
        return value

    def _next(self, *tokens: str) -> str | None:
        if self._at < len(self._tokens) and self._tokens[self._at] in tokens:
            self._at += 1
            return self._tokens[self._at - 1]
        return None

    def _sum(self) -> float:
        value = self._product()
        while sign := self._next("+", "-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> float:
        value = self._signed()
        while sign := self._next("*", "/", "//", "%"):
            other = self._signed()
            value = value * other if sign == "*" else value / other if sign == "/" else \
                value // other if sign == "//" else value % other
        return value

    def _signed(self) -> float:
        self._depth += 1
        if self._depth > DEEPEST:
            raise _NoValue
        sign = self._next("+", "-")
        value = (-self._signed() if sign == "-" else self._signed()) if sign else self._power()
        self._depth -= 1
        return value

    def _power(self) -> float:
        base = self._atom()
        if not self._next("**"):
            return base
        value = base ** self._signed()
        if isinstance(value, complex):
            raise _NoValue
        return value

    def _atom(self) -> float:
        if self._next("("):
            value = self._sum()
            if not self._next(")"):
                raise _NoValue
            return value
        if self._at == len(self._tokens) or not self._tokens[self._at][-1].isdigit():
            raise _NoValue
        self._at += 1
        return float(self._tokens[self._at - 1])


@dataclass(frozen=True)
class ArithmeticSettings:
    """What an expression is to come to."""

    column: str = "answer"
    """Column of the prompt's row whose last number the expression is to come to."""
    tolerance: float = 1e-6
    """Difference from it that is still right."""
    numbers: str | None = None
    """Column with the numbers, as "3 5 7 9" or a list, that the expression must use, each as often as it stands there (default:
    any may be used)."""

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise UserError(f"tolerance: must be at least 0, not {self.tolerance:g}")


class Arithmetic(RightOrWrong):
    """1 where the answer is an expression that comes to the right number, as in the game of 24, else 0.

    What stands after the last `=` is no part of the expression. Nothing is run: an answer that is no expression is worth 0.

    >>> reward = Arithmetic(ArithmeticSettings(numbers="numbers"))
    >>> row = {"answer": 24, "numbers": "4 6 1 1"}
    >>> reward.judge([Answer("?", text, row, True, 0, 0) for text in ("4*6*1*1", "4*6 = 24", "__import__('os')")])
    [1.0, 0.0, 0.0]
    """

    settings = ArithmeticSettings

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the right value, and of the numbers."""
        return (self.asked.column, *([self.asked.numbers] if self.asked.numbers else []))

    def _is_right(self, answer: Answer) -> bool:
        right = self._right_number(answer)
        expression = answer.text.rpartition("=")[0] or answer.text
        value = value_of(expression)
        if value is None or abs(value - right) > self.asked.tolerance:
            return False
        if self.asked.numbers is None:
            return True
        given = column_of(answer, self.asked.numbers)
        words = given if isinstance(given, (list, tuple)) else re.findall(r"[0-9]+(?:\.[0-9]+)?", str(given))
        try:
            numbers = sorted(map(float, words))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"numbers: '{self.asked.numbers}' holds {given!r:.80} in the row of sample {answer.sample:,}, and "
                            "not numbers") from None
        return numbers == sorted(map(float, re.findall(r"[0-9]+(?:\.[0-9]+)?", expression)))
