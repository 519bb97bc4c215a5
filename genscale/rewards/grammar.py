"""A reward for sentences of a small grammar, read by Earley's algorithm (1970): any context-free grammar, in bounded time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex

from genscale.errors import UserError, nearest
from genscale.rewards.base import Answer, TextReward

LONGEST = 2000
"""Characters of an answer; a longer one is no sentence."""
MOST_STEPS = 2_000_000
"""Steps of reading one answer; what takes more ends the run, by name."""
_TOKEN = regex.compile(r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<set>\[(?:[^\]\\]|\\.)+\])|"""
                       r"(?P<rule>[A-Za-z_]\w*)|(?P<sign>[|()?*+]))")
Symbol = str | frozenset[str] | tuple[str, regex.Pattern[str]]
"""A rule by its name, or a set of characters with what they are called."""


class Sentences:
    """A grammar of rules by name, the first of which is a sentence.

    Args:
        rules: each an expression of "texts", [sets] of characters as in a regular expression, names of rules, `|`, brackets and
            the signs ? * + behind what may stand there.

    Raises:
        UserError: a rule that cannot be read, or names one that is not there; "rules.<name>: <why>".

    Example:
        >>> sums = Sentences({"sum": 'number ("+" number)*', "number": "[0-9]+"})
        >>> sums.holds("1+22+3"), sums.holds("1+"), sums.holds("")
        (True, False, False)
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        if not rules:
            raise UserError("rules: names none; give one at least, as {sum: '[0-9]+ \"+\" [0-9]+'}")
        self._start = next(iter(rules))
        self._choices: dict[str, list[list[Symbol]]] = {}
        for name, text in rules.items():
            if not regex.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"rules: '{name}' is no name of a rule, which is of letters, digits and _")
            _Reader(name, text, self._choices).read()
        for name, choices in self._choices.items():
            for symbol in (symbol for choice in choices for symbol in choice):
                if isinstance(symbol, str) and symbol not in self._choices:
                    own = name.partition(" ")[0]
                    raise UserError(f"rules.{own}: '{symbol}' is no rule{nearest(symbol, rules)}; the rules are "
                                    f"{', '.join(rules)}")
        self._empty = self._may_be_empty()

    def holds(self, text: str) -> bool:
        """Whether the text is a sentence. Raises UserError where that takes more than `MOST_STEPS`."""
        # An item: the rule, which of its choices, how far in it, where in the text it began.
        columns: list[dict[tuple[str, int, int, int], None]] = [{} for _ in range(len(text) + 1)]
        columns[0] = {(self._start, number, 0, 0): None for number in range(len(self._choices[self._start]))}
        waiting: list[dict[str, list[tuple[str, int, int, int]]]] = [{} for _ in columns]
        count = 0
        for at, column in enumerate(columns):
            todo = list(column)
            while todo:
                item = todo.pop()
                rule, number, dot, began = item
                choice = self._choices[rule][number]
                new: list[tuple[str, int, int, int]] = []
                if dot == len(choice):
                    new = [(r, n, d + 1, b) for r, n, d, b in waiting[began].get(rule, ())]
                elif isinstance(symbol := choice[dot], str):
                    waiting[at].setdefault(symbol, []).append(item)
                    new = [(symbol, other, 0, at) for other in range(len(self._choices[symbol]))]
                    if symbol in self._empty:
                        new.append((rule, number, dot + 1, began))
                elif at < len(text) and _fits(symbol, text[at]):
                    columns[at + 1][(rule, number, dot + 1, began)] = None
                count += 1 + len(new)
                if count > MOST_STEPS:
                    raise UserError(f"rules: an answer of {len(text):,} characters takes more than {MOST_STEPS:,} steps to "
                                    "read: the grammar reads it in too many ways; make it less ambiguous, or set `longest`")
                for each in new:
                    if each not in column:
                        column[each] = None
                        todo.append(each)
        return any((self._start, number, len(choice), 0) in columns[-1]
                   for number, choice in enumerate(self._choices[self._start]))

    def _may_be_empty(self) -> set[str]:
        """The rules that stand for nothing at all too (Aycock and Horspool 2002: such a rule is stepped over at once)."""
        empty: set[str] = set()
        while more := {name for name, choices in self._choices.items()
                       if name not in empty and any(all(symbol in empty for symbol in choice) for choice in choices)}:
            empty |= more
        return empty


def _fits(symbol: Symbol, sign: str) -> bool:
    if isinstance(symbol, frozenset):
        return sign in symbol
    return symbol[1].fullmatch(sign) is not None  # type: ignore[union-attr]


class _Reader:
    """Reads one rule into choices; what stands in brackets or may be repeated becomes a rule of its own, `<name> <number>`."""

    def __init__(self, name: str, text: str, choices: dict[str, list[list[Symbol]]]) -> None:
        self._name, self._choices, self._number = name, choices, 0
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            if not found:
                raise UserError(f"rules.{name}: cannot be read from {text[at:at + 20]!r} on")
            self._tokens.append((found.lastgroup or "", found[found.lastgroup or 0]))
            at = found.end()
        self._at = 0

    def read(self) -> None:
        self._choices[self._name] = self._alternatives(0)
        if self._at < len(self._tokens):
            raise UserError(f"rules.{self._name}: a '{self._tokens[self._at][1]}' has nothing to stand for")

    def _sign(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) and self._tokens[self._at][0] == "sign" else ""

    def _alternatives(self, depth: int) -> list[list[Symbol]]:
        if depth > 50:
            raise UserError(f"rules.{self._name}: has more than 50 brackets in each other")
        found = [self._sequence(depth)]
        while self._sign() == "|":
            self._at += 1
            found.append(self._sequence(depth))
        return found

    def _sequence(self, depth: int) -> list[Symbol]:
        found: list[Symbol] = []
        while self._at < len(self._tokens) and self._sign() not in ("|", ")", "?", "*", "+"):
            symbols = self._one(depth)
            if (sign := self._sign()) in ("?", "*", "+") and sign:
                self._at += 1
                symbols = [self._repeated(symbols, sign)]
            found += symbols
        return found

    def _one(self, depth: int) -> list[Symbol]:
        kind, word = self._tokens[self._at]
        self._at += 1
        if kind == "rule":
            return [word]
        if kind == "set":
            try:
                return [(word, regex.compile(word, regex.DOTALL))]
            except regex.error as error:
                raise UserError(f"rules.{self._name}: {word} is no set of characters ({error})") from None
        if kind == "text":
            return [frozenset(sign) for sign in regex.sub(r"\\(.)", r"\1", word[1:-1])]
        choices = self._alternatives(depth + 1)
        if self._sign() != ")":
            raise UserError(f"rules.{self._name}: a bracket is not closed")
        self._at += 1
        return [self._own(choices)]

    def _own(self, choices: list[list[Symbol]]) -> str:
        self._number += 1
        name = f"{self._name} {self._number}"
        self._choices[name] = choices
        return name

    def _repeated(self, symbols: list[Symbol], sign: str) -> str:
        if sign == "?":
            return self._own([[], symbols])
        name = self._own([])
        self._choices[name] = [[] if sign == "*" else symbols, [name, *symbols]]
        return name


@dataclass(frozen=True)
class GrammarSettings:
    """The grammar."""

    rules: dict[str, str]
    """Rules by name, the first of which is a whole answer, as {sum: 'number ("+" number)*', number: '[0-9]+'}: "texts", [sets]
    of characters, names of rules, | between choices, brackets, and ? * + behind what may stand there."""
    longest: int = 500
    """Characters of the longest answer that is read; a longer one is no sentence."""

    def __post_init__(self) -> None:
        Sentences(self.rules)
        if not 1 <= self.longest <= LONGEST:
            raise UserError(f"longest: must be from 1 to {LONGEST}, not {self.longest}")


class Grammar(TextReward):
    """1 where the answer is a sentence of a context-free grammar, else 0.

    >>> reward = Grammar(GrammarSettings({"nest": '"(" nest ")" | [a-z]'}))
    >>> reward.judge([Answer("?", text, {}, True, 0, 0) for text in ("((x))", "((x)", "xy")])
    [1.0, 0.0, 0.0]
    """

    settings = GrammarSettings

    def __init__(self, asked: GrammarSettings) -> None:
        super().__init__(asked)
        self._sentences = Sentences(asked.rules)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises UserError where an answer takes too many steps to read."""
        return [float(len(answer.text) <= self.asked.longest and self._sentences.holds(answer.text)) for answer in answers]
