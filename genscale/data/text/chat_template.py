"""Conversations written as text by a tokenizer's chat template, and which of its characters are the assistant's.

Where the template marks what the assistant writes (`{% generation %}`), those are its answers, as in transformers. Where it
does not, an answer is what the template writes in a message's turn of its loop over the messages, without the header (what it
asks for an answer with: `add_generation_prompt`) and up to and with the end-of-turn tokens. White space after those is the
template's: nobody generates it. Thoughts are the assistant's, their opening tag too, also where the template would ask for an
answer with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from genscale.data.text.chat_rendering import QUESTION, ChatRenderer, Message, Refusal, Span, Unbounded, Written, reason
from genscale.errors import UserError

START, STOP = "\ue0f0<[", "]>\ue0f1"
"""Marks around what the assistant says, for templates without a loop over the messages; in a second rendering only."""
THOUGHTS = re.compile(r"[<\[◁]/?[^<>\[\]◁▷]*?(?:think|thought|reason)[^<>\[\]◁▷]*[>\]▷]", re.IGNORECASE)
"""A tag around thoughts: `<think>`, `[THINK]`, `<|START_THINKING|>`."""


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
        self._renderer = ChatRenderer(source, special_tokens, name)

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """The conversation as text.

        Raises:
            Refusal: the template refuses it.
        """
        return self._renderer.render(messages, tools).text

    def asked(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant's answer to it begins. Raises Refusal."""
        return self._renderer.render(messages, None, add_generation_prompt=True).text

    def answers(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The conversation as text, and (start, stop) of the characters that the assistant writes.

        Args:
            tools: what the assistant may call, as the template is given them.

        Raises:
            Refusal: the template refuses the conversation, or does not show the assistant's words as they are.
        """
        written = self._renderer.render(messages, tools)
        if self._renderer.marks_answers:
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
        asked, without = self._renderer.render(messages, tools, True), self._renderer.render(messages, tools)
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
                said = [message or {"role": "assistant", "content": words} for message in messages]
                written = self._renderer.render(said, None)
            except Refusal:
                return Surroundings("", "")
            turns.append("".join(written.text[start:stop] for start, stop in _own(written, 1)))
        if turns[0] == turns[1]:
            return Surroundings("", "")
        before, after = _shared(*turns), _shared(*(turn[::-1] for turn in turns))[::-1]
        return Surroundings(THOUGHTS.split(before)[0], after)

    def _marked_answers(self, messages: Sequence[Message], tools: list[Any] | None, plain: str) -> list[Span]:
        """The answers of a template that has no loop over the messages, by marks around the assistant's words."""
        marked = self._renderer.render([_marked(message) for message in messages], tools).text
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
            self._renderer.render_as_given([*QUESTION, {"role": "assistant", "content": "answer"}], None, False)
        except Unbounded as refusal:
            raise UserError(f"data.tokenizer={self._name}: its chat template fails on a mere question and its answer "
                            f"({reason(refusal.__context__)}); mend the template") from None
        except Refusal:
            pass
        turns = [self._around(last) for last in (False, True)]
        if self._renderer.marks_answers or any(any(turn) for turn in turns):
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
