"""From rows of prompt/answer pairs or of messages to documents: a JSON list of messages each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from genscale.data.spec import Spec
from genscale.errors import UserError


def conversations(columns: Mapping[str, list[Any]], spec: Spec, kept: list[bool] | None,
                  row_of: Callable[[int], str]) -> list[str | None]:
    """A document for each row; None for one that is not kept, or in which nobody answers.

    Args:
        columns: the values of the columns that `spec.content` names, by column.
        kept: which rows the filters keep; None where all are.
        row_of: what to call a row in messages.

    Raises:
        UserError: a row that is no conversation, or an empty answer.
    """
    if spec.messages:
        found = columns[spec.messages]
    else:
        found = [None if prompt is None and answer is None else
                 [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": answer}]
                 for prompt, answer in zip(columns[spec.prompt], columns[spec.answer], strict=True)]
    return [_conversation(messages, spec, row_of(i)) if messages and (kept is None or kept[i]) else None
            for i, messages in enumerate(found)]


def _conversation(messages: list[Any], spec: Spec, where: str) -> str | None:
    """A document of a conversation; None where nobody answers, for there is nothing to learn in it."""
    setting = "messages_column" if spec.messages else "answer_column"
    key = f"{spec.setting(setting)}={spec.messages or spec.answer}"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{key}: {where} holds {str(message)[:80]!r}, not a message with role and content")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{key}: in {where} the content of a message is {str(content)[:80]!r}, not text")
        if message["role"] == "assistant" and not (content or "").strip():
            advice = f"; {spec.setting('filters')} with {spec.answer}: \"!=\" leaves such rows out" if spec.answer else ""
            raise UserError(f"{key}: {where} has an empty answer; mend or remove it{advice}")
    if all(message["role"] != "assistant" for message in messages):
        return None
    # Arrow gives every message the keys of all; the ones it does not have are None.
    plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return json.dumps(plain, ensure_ascii=False, default=str)  # a message may carry its time


def pair_text(document: str) -> str:
    """What the messages of a prompt/answer document say, for learning a vocabulary from it."""
    return "\n".join(message.get("content", "") for message in json.loads(document))
