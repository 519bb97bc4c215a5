"""Rewards that ask for a form: JSON, by a schema or any, and brackets that close."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from genscale.errors import UserError
from genscale.reading import Unreadable, parse_json
from genscale.rewards.base import Answer, TextReward
from genscale.rewards.schema import check_schema, fits


@dataclass(frozen=True)
class JsonSettings:
    """What the JSON is to hold."""

    schema: dict[str, Any] = field(default_factory=dict)
    """A JSON Schema (draft 2020-12) that it must fit; references and formats are refused (default: any JSON is right)."""

    def __post_init__(self) -> None:
        check_schema(self.schema, "schema")


class Json(TextReward):
    """1 where the answer is JSON, of the schema where one is given, else 0.

    >>> reward = Json(JsonSettings({"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ('{"age": 7}', '{"age": "7"}', '{"age": 7')])
    [1.0, 0.0, 0.0]
    """

    settings = JsonSettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        return [float(self._is_right(answer.text)) for answer in answers]

    def _is_right(self, text: str) -> bool:
        try:
            return fits(parse_json(text, strictly=True), self.asked.schema)
        except Unreadable:
            return False


@dataclass(frozen=True)
class BalancedSettings:
    """Which brackets."""

    pairs: list[str] = field(default_factory=lambda: ["()", "[]", "{}"])
    """Each an opening and a closing character."""
    only: bool = False
    """An answer may hold nothing else."""
    deepest: int = 1000
    """Brackets in each other at most."""

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise UserError(f"pairs: '{pair}' is no opening and closing character like '()'")
        signs = "".join(self.pairs)
        if not signs or len(set(signs)) < len(signs):
            raise UserError(f"pairs: {self.pairs} must name each character once, as ['()', '[]']")
        if self.deepest < 1:
            raise UserError(f"deepest: must be at least 1, not {self.deepest}")


class Balanced(TextReward):
    """1 where every bracket of the answer is closed in turn, and there is one at least, else 0.

    >>> reward = Balanced(BalancedSettings())
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("f(a[1])", "(]", "()(", "none")])
    [1.0, 0.0, 0.0, 0.0]
    """

    settings = BalancedSettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        return [float(self._is_right(answer.text)) for answer in answers]

    def _is_right(self, text: str) -> bool:
        closing = {pair[0]: pair[1] for pair in self.asked.pairs}
        ends, some = set(closing.values()), False
        open_ones: list[str] = []
        for sign in text:
            if sign in closing:
                open_ones.append(closing[sign])
                some = True
                if len(open_ones) > self.asked.deepest:
                    return False
            elif sign in ends:
                if not open_ones or open_ones.pop() != sign:
                    return False
            elif self.asked.only:
                return False
        return some and not open_ones


