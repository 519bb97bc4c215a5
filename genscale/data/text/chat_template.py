"""Conversations written as text by a tokenizer's chat template, and which of its characters are the assistant's.

The template is rendered in a sandbox, as transformers' `apply_chat_template` renders it: templates come from strangers. Where
it marks what the assistant writes (`{% generation %}`), those are its answers, as in transformers. Where it does not, an answer
is what the template writes in a message's turn of its loop over the messages, without the header (what it asks for an answer
with: `add_generation_prompt`) and up to and with the end-of-turn tokens. White space after those is the template's: nobody
generates it. Thoughts are the assistant's, their opening tag too, also where the template would ask for an answer with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from genscale.data.conversations import said
from genscale.data.text.template_sandbox import Sandbox, TooMuch
from genscale.data.text.template_turns import Turn
from genscale.errors import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]
START, STOP = "\ue0f0<[", "]>\ue0f1"
"""Marks around what the assistant says, for templates without a loop over the messages; in a second rendering only."""
TODAY = datetime(2024, 7, 26)
"""The day it is for every template (Llama 3's default): a run must see the same tokens on whatever day it is resumed."""
THOUGHTS = re.compile(r"[<\[◁]/?[^<>\[\]◁▷]*?(?:think|thought|reason)[^<>\[\]◁▷]*[>\]▷]", re.IGNORECASE)
"""A tag around thoughts: `<think>`, `[THINK]`, `<|START_THINKING|>`."""
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Under which messages carry thoughts beside their content; templates read the first or the second."""
QUESTION = [{"role": "user", "content": "question"}]


class Refusal(UserError):
    """A conversation that the template does not write."""


class Unbounded(Refusal):
    """A template that works or writes too much."""


class Written(NamedTuple):
    """A rendering.

    Attributes:
        text: what was written.
        shown: number of a message -> where in the text it stands.
        inner: (number of a message, start, stop) of those that stand inside another's.
        last: where the last message ends.
        generated: what the template marks as the assistant's.
    """

    text: str
    shown: dict[int, list[Span]]
    inner: list[tuple[int, int, int]]
    last: int
    generated: list[Span]


class Surroundings(NamedTuple):
    """What the template writes around every answer: before and after it."""

    before: str
    after: str


class ChatTemplate:
    """A chat template. Threads may share it.

    Args:
        source: Jinja source.
        special_tokens: what the template may refer to: `eos_token` and its like.
        special_texts: texts of all special tokens.
        name: the tokenizer's name, for messages.
        ends: texts of tokens that end a generation, besides `eos_token`.

    Raises:
        UserError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], special_texts: Sequence[str], name: str,
                 ends: Sequence[str] = ()) -> None:
        self._special_tokens, self._name, self._special = dict(special_tokens), name, tuple(filter(None, special_texts))
        ends = [end for end in (special_tokens.get("eos_token"), *ends) if end]
        self._ends = re.compile(rf"\s*({'|'.join(map(re.escape, ends))})") if ends else None
        special = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        self._specials = re.compile(rf"\s*((?:(?:{special})\s*)*(?:{special}))\s*") if special else None
        self._next_special = re.compile(rf"\s*(?:{special})") if special else None
        self._sandbox = Sandbox()
        self._sandbox.add_filter("tojson", _to_json)
        self._sandbox.globals["raise_exception"] = _raise
        if not re.search(r"\bstrftime_now\s+is\s+(not\s+)?defined", source):  # one that asks has a date of its own
            self._sandbox.globals["strftime_now"] = TODAY.strftime
        try:
            self._template = self._sandbox.from_string(source)
        except Exception as error:  # whatever a stranger's source does to Jinja's compiler and to Python's
            raise UserError(f"data.tokenizer={name}: its chat template cannot be read ({_reason(error)}); mend it in "
                            "tokenizer_config.json or chat_template.jinja") from None
        self._marks_itself = self._sandbox.marks_answers

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The conversation as text.

        Raises:
            Refusal: the template refuses it.
        """
        return self._render(messages, tools).text

    def asked(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's answer to it begins. Raises Refusal."""
        return self._render(messages, None, add_generation_prompt=True).text

    def answers(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The conversation as text, and (start, stop) of the characters that the assistant writes.

        Args:
            tools: what the assistant may call, as the template is given them.

        Raises:
            Refusal: the template refuses the conversation, or does not show the assistant's words as they are.
        """
        written = self._render(messages, tools)
        if self._marks_itself:
            return written.text, written.generated
        if not any(message["role"] == "assistant" and number in written.shown for number, message in enumerate(messages)):
            return written.text, self._marked_answers(messages, tools, written.text)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                for start, stop in _own(written, number):
                    spans += self._answer(written, start, stop, number, messages, tools)
        return written.text, [(start, stop) for start, stop in spans if start < stop]

    def _answer(self, written: Written, start: int, stop: int, number: int, messages: Sequence[Message],
                tools: list[Any] | None) -> list[Span]:
        """The part of a turn that the assistant writes, and what ends it."""
        turn, last = self._without_next(written.text[start:stop]), number == len(messages) - 1
        begin = start + self._beginning(turn, start, number, last, messages, tools)
        closed = turn.rstrip().endswith(self._special)
        if closed:
            stop = start + len(turn.rstrip())
        else:
            after = self._around(last).after
            stop = start + len(turn) - (len(after) - len(after.rstrip()) if after and turn.endswith(after) else 0)
        rest = written.text[stop:]
        if closed:  # a template may end the conversation with another token
            beyond = self._specials.fullmatch(rest) if self._specials and last else None
            return [(begin, stop), *([(stop + beyond.start(1), stop + beyond.end(1))] if beyond else [])]
        beyond = self._specials.fullmatch(rest) if self._specials and last else self._ends.match(rest) if self._ends else None
        return [(begin, stop + (beyond.end(1) if beyond else 0))]

    def _without_next(self, turn: str) -> str:
        """A turn without the beginning-of-text token that some templates write after it, for the turn that follows."""
        begins = self._special_tokens.get("bos_token")
        if not begins or begins == self._special_tokens.get("eos_token") or not turn.rstrip().endswith(begins):
            return turn
        rest = turn.rstrip().removesuffix(begins)
        return rest if rest.rstrip().endswith(self._special) else turn

    def _beginning(self, turn: str, start: int, number: int, last: bool, messages: Sequence[Message],
                   tools: list[Any] | None) -> int:
        """Characters of the turn before what the assistant writes."""
        for header in self._headers:
            if turn.startswith(header):
                return len(header)
        if number == 0:  # the template's own beginning comes before
            for header in [*self._headers, *map(str.lstrip, self._headers)] or [self._around(last).before]:
                if header and header in turn:
                    return turn.index(header) + len(header)
            return 0
        if not self._headers:
            before = self._around(last).before
            return len(before) if turn.startswith(before) else 0
        # After other messages than a user's the template may ask in another way.
        try:
            headers = self._headers_after(messages[:number], tools)
        except Refusal:
            headers = []
        headers += [header.rstrip() for header in self._headers]
        return next((len(header) for header in headers if header and turn.startswith(header)), 0)

    @cached_property
    def _headers(self) -> list[str]:
        """What the template may write to ask for an answer to a question, the longest first; none where it does not ask, or
        is for other conversations."""
        try:
            return self._headers_after(QUESTION, None)
        except Refusal:
            return []

    def _headers_after(self, messages: Sequence[Message], tools: list[Any] | None) -> list[str]:
        asked, without = self._render(messages, tools, True), self._render(messages, tools)
        found = [asked.text[asked.last:]] if asked.shown else []
        if asked.text.startswith(without.text):
            found.append(asked.text[len(without.text):])
        found = [THOUGHTS.split(header)[0] for header in found]
        return sorted({header for header in found if header.strip()}, key=len, reverse=True)

    def _around(self, last: bool) -> Surroundings:
        return self._surroundings[last]

    @cached_property
    def _surroundings(self) -> tuple[Surroundings, Surroundings]:
        """What stands around every answer that is not the last message, and around one that is."""
        return self._surroundings_of([*QUESTION, {}, *QUESTION]), self._surroundings_of([*QUESTION, {}])

    def _surroundings_of(self, messages: list[Message]) -> Surroundings:
        turns = []
        for words in ("alpha", "Bravo!"):  # nothing in common
            try:
                written = self._render([message or {"role": "assistant", "content": words} for message in messages], None)
            except Refusal:
                return Surroundings("", "")
            turns.append("".join(written.text[start:stop] for start, stop in _own(written, 1)))
        if turns[0] == turns[1]:
            return Surroundings("", "")
        before, after = _shared(*turns), _shared(*(turn[::-1] for turn in turns))[::-1]
        return Surroundings(THOUGHTS.split(before)[0], after)

    def _marked_answers(self, messages: Sequence[Message], tools: list[Any] | None, plain: str) -> list[Span]:
        """The answers of a template that has no loop over the messages, by marks around the assistant's words."""
        marked = self._render([_marked(message) for message in messages], tools).text
        text, starts, stops = _without_marks(marked)
        if text != plain or len(stops) != sum(message["role"] == "assistant" for message in messages):
            raise self._hidden()
        spans, done = [], 0
        for start, stop in zip(starts, stops, strict=True):
            header = next((at + len(header) for header in self._headers if (at := text.rfind(header, done, start)) >= 0), start)
            end = self._next_special.match(text, stop) if self._next_special else None
            done = end.end() if end else stop
            spans.append((header, done))
        return spans

    def check(self) -> None:
        """Raises UserError for a template that does not show what the assistant says: the answers cannot be told then. One that
        works too much for a question and an answer is tried but once."""
        try:
            self._write([*QUESTION, {"role": "assistant", "content": "answer"}], None, False)
        except Unbounded as refusal:
            raise UserError(f"data.tokenizer={self._name}: its chat template fails on a mere question and its answer "
                            f"({_reason(refusal.__context__)}); mend the template") from None
        except Refusal:
            pass
        turns = [self._around(last) for last in (False, True)]
        if self._marks_itself or any(any(turn) for turn in turns):
            return
        for words in ("alpha", "Bravo!"):
            try:
                text = self.render([*QUESTION, {"role": "assistant", "content": words}])
            except Refusal:
                return
            if words not in text:
                raise self._hidden()

    def _hidden(self) -> Refusal:
        return Refusal(f"data.tokenizer={self._name}: its chat template does not show what the assistant says as it is, so "
                       "that answers cannot be told from prompts; mend the template (with {% generation %}), or leave it out")

    @cached_property
    def _reads(self) -> str:
        """Whether the template reads a message's content as "text", as "parts" ([{"type": "text", ...}]), or "both"."""
        kinds: dict[str, Sequence[Mapping[str, Any]]] = {
            "text": QUESTION, "parts": [{**QUESTION[0], "content": [{"type": "text", "text": "question"}]}]}
        read = []
        for kind, messages in kinds.items():
            with suppress(Refusal):
                text = self._write(messages, None, False).text
                read += [kind] if "question" in text and "'type'" not in text else []
        return "parts" if read == ["parts"] else "both" if len(read) == 2 else "text"

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> Written:
        if self._reads != "both":
            wanted = str if self._reads == "text" else list
            messages = [message if message.get("content") is None or isinstance(message["content"], wanted) else
                        {**message, "content": said(message) if wanted is str else [{"type": "text", "text": said(message)}]}
                        for message in messages]
        return self._write(messages, tools, add_generation_prompt)

    def _write(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool) -> Written:
        turns, size = [], 0
        for number, message in enumerate(messages):
            turn = {key: value for key, value in message.items() if value is not None}  # as transformers does
            if (thought := next((turn[key] for key in THOUGHT_KEYS if key in turn), None)) is not None:
                turn = {THOUGHT_KEYS[1]: thought, **turn, THOUGHT_KEYS[0]: thought}
            turns.append(Turn.numbered(number, turn))
            size += len(str(message))
        try:
            text = self._sandbox.write(self._template, size + len(str(tools)), {
                "messages": turns, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt,
                **self._special_tokens})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                RecursionError) as error:
            beginning = json.dumps(list(messages), ensure_ascii=False, default=str)[:120]
            refusal = Unbounded if isinstance(error, TooMuch) else Refusal
            raise refusal(f"data.tokenizer={self._name}: its chat template refuses the conversation {beginning}... "
                          f"({_reason(error)}); mend or remove it") from None
        rendering = self._sandbox.rendering
        return Written(text, rendering.shown, rendering.inner, rendering.last, rendering.generated)


def _own(written: Written, number: int) -> list[Span]:
    """The stretches of a message, without those of other messages that lie inside."""
    parts = []
    for start, stop in written.shown.get(number, []):
        for other, begin, end in written.inner:
            if other != number and start <= begin and end <= stop:
                parts.append((start, begin))
                start = end
        parts.append((start, stop))
    return [(start, stop) for start, stop in parts if start < stop]


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    return one[: next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))]


def _marked(message: Message) -> Message:
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or not content.strip():
        return message
    # Inside the white space, which a template may trim.
    core = content.strip()
    before, _, after = content.partition(core)
    return {**message, "content": f"{before}{START}{core}{STOP}{after}"}


def _without_marks(marked: str) -> tuple[str, list[int], list[int]]:
    """The text without its marks, and where they stood."""
    text, starts, stops = "", [], []
    for part in re.split(f"({re.escape(START)}|{re.escape(STOP)})", marked):
        if part == START:
            starts.append(len(text))
        elif part == STOP:
            stops.append(len(text))
        else:
            text += part
    return text, starts, stops


def _reason(error: BaseException | None) -> str:
    return str(error).replace(f"{Turn.__module__}.{Turn.__name__}", "message")[:200] or type(error).__name__


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
