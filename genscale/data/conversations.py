"""From rows of prompt/answer pairs or of messages to documents: a JSON list of messages each, or an object with tools too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

from genscale.data.json_values import DEEPEST, shown
from genscale.data.spec import Spec
from genscale.errors import UserError
from genscale.reading import deeper

BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What an answer may consist of where it has no content."""

ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)
"""How documents are written as JSON. (A message of a table may carry its time.)"""


class Conversation(str):
    """A document of a conversation, with what to call its row in messages."""

    __slots__ = ("where",)
    where: str


def conversations(columns: Mapping[str, list[Any]], spec: Spec, kept: list[bool] | None,
                  row_of: Callable[[int], str]) -> list[str | None]:
    """A document for each row; None for one that is not kept, in which nobody answers, or that is left out for what is wrong
    with it. What is left out is counted in `spec.left_out`.

    Args:
        columns: the values of the columns that `spec.content` and `spec.tools` name, by column.
        kept: which rows the filters keep; None where all are.
        row_of: what to call a row in messages.

    Raises:
        UserError: too many rows are no conversations that can be learnt from.
    """
    names = [spec.messages, spec.tools] if spec.messages else [spec.prompt, spec.answer]
    rows = zip(*(columns.get(name or "", repeat(None)) for name in names), strict=False)
    empty = (None,) if spec.messages else (None, None)
    return [None if row[: len(empty)] == empty or row[0] == [] or not (kept is None or kept[i]) else
            _document(row[0], row[1], spec, row_of(i)) for i, row in enumerate(rows)]


def _document(first: Any, second: Any, spec: Spec, where: str) -> str | None:
    """The document of messages and tools, or of a prompt and its answer."""
    spec.left_out.read += 1
    try:
        messages, tools = (first, second) if spec.messages else (_pair(first, second, spec, where), None)
        key = f"{spec.setting('messages_column' if spec.messages else 'answer_column')}={spec.messages or spec.answer}"
        if not isinstance(messages, list):
            raise UserError(f"{key}: {where} holds {shown(messages)}, not a list of messages with role and content")
        messages = [_message(message, spec, f"{key}: {where}") for message in messages]
        if all(message["role"] != "assistant" for message in messages):
            spec.left_out.pass_over([message["role"] for message in messages])
            return None
        tools = _tools(tools, f"{spec.setting('tools_column')}={spec.tools}: {where}")
        document = Conversation(_written({"messages": messages, "tools": tools} if tools else messages, f"{key}: {where}"))
    except UserError as error:
        spec.left_out.refuse(error)
        return None
    document.where = f"{spec.key}={spec.name}: {where}"
    return document


def _written(content: Any, where: str) -> str:
    try:
        text = ENCODER.encode(content)
        if text.count("[") + text.count("{") <= DEEPEST or not deeper(content, DEEPEST):
            return text
    except RecursionError:
        pass
    raise UserError(f"{where} is nested deeper than the {DEEPEST} lists and objects that are read; mend or remove it")


def _pair(prompt: Any, answer: Any, spec: Spec, where: str) -> list[dict[str, Any]]:
    for setting, value in (("prompt_column", prompt), ("answer_column", answer)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{spec.setting(setting)}={spec.content[setting]}: {where} holds {shown(value)}, not text")
    return [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": answer}]


def _message(message: Any, spec: Spec, where: str) -> dict[str, Any]:
    """The message, of the role `assistant` where its role answers."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        shape = isinstance(message, dict) and {"from", "value"} <= message.keys()
        advice = "; it has from and value, as ShareGPT: write them as role and content, human as user, gpt as assistant"
        raise UserError(f"{where} holds {str(message)[:80]!r}, not a message with role and content{advice if shape else ''}")
    if None in message.values():
        message = {name: value for name, value in message.items() if value is not None}  # as transformers does
    content, answers = message.get("content"), message["role"] in spec.answer_roles
    if not spec.messages:
        answers = message["role"] == "assistant"
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else None
                what = f"a part of type {kind!r}" if kind not in (None, "text") else f"the part {str(part)[:80]!r}"
                raise UserError(f"{where} has {what} in the content of a message; only text is learnt from, like "
                                '{"type": "text", "text": "hello"}')
    elif content is not None and not isinstance(content, str):
        raise UserError(f"{where}: the content of a message is {str(content)[:80]!r}, not text")
    if answers:
        if not said(message).strip() and not any(message.get(name) for name in BESIDE_CONTENT):
            advice = f"; {spec.setting('filters')} with {spec.answer}: \"!=\" leaves such rows out" if spec.answer else ""
            raise UserError(f"{where} has an empty answer; mend or remove it{advice}")
        if message["role"] != "assistant":
            message = {**message, "role": "assistant"}
    elif message["role"] == "assistant":  # who answers are others
        raise UserError(f"{where} has the role assistant, which {spec.setting('answer_roles')}={list(spec.answer_roles)} does "
                        "not name, though the template gives it the assistant's turns; name it too, or rename it")
    return message


def _tools(tools: Any, where: str) -> list[Any] | None:
    """The tools that a row offers, a list or the JSON of one; None where there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(f"{where} has tools that are no JSON ({tools[:80]!r}); mend them, or set tools_column to null"
                            ) from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where} has tools that are no list of objects ({str(tools)[:80]!r}); mend them, or set tools_column "
                        "to null")
    return tools


def said(message: Mapping[str, Any]) -> str:
    """The text of a message's content, its parts line by line."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def read_document(document: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools) of a document."""
    content = json.loads(document)
    return (content["messages"], content["tools"]) if isinstance(content, dict) else (content, None)


def pair_text(document: str) -> str:
    """What the messages of a document say, for learning a vocabulary from it."""
    return "\n".join(map(said, read_document(document)[0]))
