"""From rows to prompts: a JSON object each, with what is asked and the columns of its row that travel with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from genscale.data.conversations import ENCODER, Conversation, said
from genscale.data.json_values import shown
from genscale.data.spec import Spec
from genscale.errors import UserError


def prompts(asked: list[Any], beside: Mapping[str, list[Any]], spec: Spec, kept: list[bool] | None,
            row_of: Callable[[int], str]) -> list[str | None]:
    """A document for each row; None for one that is not kept, or that asks nothing, which is counted in `spec.left_out`.

    Args:
        asked: the values of the column of prompts, or of conversations.
        beside: those of the columns that travel with them, by column.
        kept: which rows the filters keep; None where all are.
        row_of: what to call a row in messages.

    Raises:
        UserError: too many rows ask nothing.
    """
    return [_document(content, {name: values[i] for name, values in beside.items()}, spec, row_of(i))
            if kept is None or kept[i] else None for i, content in enumerate(asked)]


def _document(content: Any, row: dict[str, Any], spec: Spec, where: str) -> str | None:
    spec.left_out.read += 1
    setting, column = next(iter(spec.content.items()))
    try:
        _check(content, spec, f"{spec.setting(setting)}={column}: {where}")
        document = Conversation(ENCODER.encode({"asked": content, "row": row}))
    except UserError as error:
        spec.left_out.refuse(error)
        return None
    document.where = f"{spec.key}={spec.name}: {where}"
    return document


def _check(content: Any, spec: Spec, where: str) -> None:
    """Raises UserError for what asks nothing."""
    if not spec.messages:
        if content is not None and not isinstance(content, str):
            raise UserError(f"{where} holds {shown(content)}, not text")
        if content is None or not content.strip():
            raise UserError(f"{where} has an empty prompt; mend or remove it")
        return
    if not isinstance(content, list) or not all(isinstance(message, dict) and isinstance(message.get("role"), str)
                                                and isinstance(message.get("content"), (str, list)) for message in content):
        raise UserError(f"{where} holds {shown(content)}, not a list of messages with role and content")
    if not content or not said(content[-1]).strip():
        raise UserError(f"{where} has an empty prompt; mend or remove it")
    if content[-1]["role"] in spec.answer_roles:
        raise UserError(f"{where} ends with an answer, of role {content[-1]['role']}, and asks nothing; remove that message")


def read_prompt(document: str) -> tuple[list[dict[str, Any]] | str, dict[str, Any]]:
    """What is asked, a text or messages, and the columns of its row."""
    content = json.loads(document)
    return content["asked"], content["row"]


def last_words(asked: list[dict[str, Any]] | str) -> str:
    """The text of what is asked last."""
    return asked if isinstance(asked, str) else said(asked[-1])
