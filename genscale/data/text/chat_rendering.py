"""A chat template makes text of a conversation, in a sandbox, as transformers' `apply_chat_template` does: templates come from
strangers."""

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
TODAY = datetime(2024, 7, 26)
"""The day it is for every template (Llama 3's default): a run must see the same tokens on whatever day it is resumed."""
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


class ChatRenderer:
    """Renders one template. Threads may share it.

    Args:
        source: Jinja source.
        special_tokens: what the template may refer to: `eos_token` and its like.
        name: the tokenizer's name, for messages.

    Attributes:
        marks_answers: the template itself says what the assistant writes (`{% generation %}`).

    Raises:
        UserError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self._special_tokens, self._name = dict(special_tokens), name
        self._sandbox = Sandbox()
        self._sandbox.add_filter("tojson", _to_json)
        self._sandbox.globals["raise_exception"] = _raise
        if not re.search(r"\bstrftime_now\s+is\s+(not\s+)?defined", source):  # one that asks has a date of its own
            self._sandbox.globals["strftime_now"] = TODAY.strftime
        try:
            self._template = self._sandbox.from_string(source)
        except Exception as error:  # whatever a stranger's source does to Jinja's compiler and to Python's
            raise UserError(f"data.tokenizer={name}: its chat template cannot be read ({reason(error)}); mend it in "
                            "tokenizer_config.json or chat_template.jinja") from None
        self.marks_answers = self._sandbox.marks_answers

    @cached_property
    def _reads(self) -> str:
        """Whether the template reads a message's content as "text", as "parts" ([{"type": "text", ...}]), or "both"."""
        kinds: dict[str, Sequence[Mapping[str, Any]]] = {
            "text": QUESTION, "parts": [{**QUESTION[0], "content": [{"type": "text", "text": "question"}]}]}
        read = []
        for kind, messages in kinds.items():
            with suppress(Refusal):
                text = self.render_as_given(messages, None, False).text
                read += [kind] if "question" in text and "'type'" not in text else []
        return "parts" if read == ["parts"] else "both" if len(read) == 2 else "text"

    def render(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> Written:
        """The conversation as text, whose contents are given as the template reads them: as text or as parts.

        Args:
            tools: what the assistant may call.
            add_generation_prompt: ask for an answer at the end.

        Raises:
            Refusal: the template refuses it.
        """
        if self._reads != "both":
            wanted = str if self._reads == "text" else list
            messages = [message if message.get("content") is None or isinstance(message["content"], wanted) else
                        {**message, "content": said(message) if wanted is str else [{"type": "text", "text": said(message)}]}
                        for message in messages]
        return self.render_as_given(messages, tools, add_generation_prompt)

    def render_as_given(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool) -> Written:
        """The same, whatever kind the contents are of."""
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
                          f"({reason(error)}); mend or remove it") from None
        rendering = self._sandbox.rendering
        return Written(text, rendering.shown, rendering.inner, rendering.last, rendering.generated)



def reason(error: BaseException | None) -> str:
    """What went wrong, in the words of a template's author."""
    return str(error).replace(f"{Turn.__module__}.{Turn.__name__}", "message")[:200] or type(error).__name__


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
