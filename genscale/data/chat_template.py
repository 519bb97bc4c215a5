"""Conversations written as text by a tokenizer's chat template, and which of its characters are the assistant's.

The template is rendered in a sandbox, as transformers' `apply_chat_template` renders it: templates come from strangers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from genscale.errors import UserError

Message = Mapping[str, Any]
START, STOP = "\ue0f0<[", "]>\ue0f1"
"""Marks around what the assistant says. They stand in a second rendering only, to find the places."""
TODAY = datetime(2024, 7, 26)
"""The day it is for every template (Llama 3's default): a run must see the same tokens on whatever day it is resumed."""


class _Generation(Extension):
    """`{% generation %}`: where a template itself says what the assistant's part is, it is marked."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{START}{caller()}{STOP}"


class ChatTemplate:
    """A chat template.

    Args:
        source: Jinja source.
        special_tokens: what the template may refer to: `eos_token` and its like.
        special_texts: texts of all special tokens; one that follows an answer is the answer's end.
        name: the tokenizer's name, for messages.

    Raises:
        UserError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], special_texts: Sequence[str], name: str) -> None:
        self._special_tokens, self._name = dict(special_tokens), name
        self._ends = re.compile(f" *(?:{'|'.join(map(re.escape, special_texts))})") if special_texts else None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        if not re.search(r"\bstrftime_now\s+is\s+(not\s+)?defined", source):  # one that asks has a date of its own
            environment.globals["strftime_now"] = TODAY.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"data.tokenizer={name}: its chat template cannot be read ({error}); mend it in "
                            "tokenizer_config.json or chat_template.jinja") from None
        self._marks_itself = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._header = self._find_header()

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text.

        Raises:
            UserError: the template refuses it.
        """
        return _without_marks(self._render(messages))[0]

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and (start, stop) of the characters that the assistant writes: what follows the header of
        its turn, up to and with the special token that ends it.

        Raises:
            UserError: the template refuses the conversation, or does not show the assistant's words as they are.
        """
        marked = messages if self._marks_itself else [_marked(message) for message in messages]
        text, starts, stops = _without_marks(self._render(marked))
        answers = len(stops) if self._marks_itself else sum(message["role"] == "assistant" for message in messages)
        if text != self.render(messages) or len(stops) != answers:
            raise UserError(f"data.tokenizer={self._name}: its chat template does not show what the assistant says as it is, "
                            "so that answers cannot be told from prompts; mend the template (with {% generation %}), or leave "
                            "it out")
        if self._marks_itself:
            return text, list(zip(starts, stops, strict=True))
        spans, done = [], 0
        for stop in stops:
            start = self._beginning(text, [start for start in starts if done <= start <= stop], done, stop)
            end = self._ends.match(text, stop) if self._ends else None
            done = end.end() if end else stop
            spans.append((start, done))
        return text, spans

    def _beginning(self, text: str, starts: list[int], done: int, stop: int) -> int:
        """Where a turn of the assistant begins: after its header. A template may drop the beginning of what it says (the
        thoughts of earlier turns), or write something of its own before."""
        latest = starts[-1] if starts else stop
        header = text.rfind(self._header, done, latest) if self._header else -1
        return header + len(self._header) if header >= 0 else latest

    def _find_header(self) -> str:
        """What the template writes before the assistant speaks; empty where it does not say."""
        question = [{"role": "user", "content": "question"}]
        try:
            without, asked = self._render(question), self._render(question, add_generation_prompt=True)
        except UserError:  # a template for other conversations
            return ""
        return asked.removeprefix(without) if asked.startswith(without) else ""

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(messages=[dict(message) for message in messages], tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"data.tokenizer={self._name}: its chat template refuses the conversation "
                            f"{json.dumps(list(messages), ensure_ascii=False)[:120]}... ({error}); mend or remove it") from None


def _marked(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    # Inside the white space, which a template may trim.
    content = message["content"]
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


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
