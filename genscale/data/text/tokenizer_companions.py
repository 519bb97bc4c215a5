"""What the files beside a `tokenizer.json` in a Hugging Face folder add to it: named special tokens and a chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.reading import read_json

LARGEST_ID = 2**24
"""No token has an id from here on: the largest published vocabularies have a sixteenth of it."""
TOOL_USE = "tool_use"
"""What transformers calls a template for conversations with tools."""


@dataclass(frozen=True)
class Companions:
    """What the files beside a `tokenizer.json` add to it.

    Attributes:
        special_tokens: name (`eos_token`, `bos_token`, ...) -> its text, as `tokenizer_config.json` has it.
        chat_template: Jinja source by which a conversation is written as text, or None.
        tool_template: another for conversations with tools, where there is one.
        end_ids: ids that end a generation, as `generation_config.json` has them.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    tool_template: str | None = None
    end_ids: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write what there is to `tokenizer_config.json`."""
        template: dict[str, Any] = {"chat_template": self.chat_template} if self.chat_template else {}
        if self.tool_template:
            template["chat_template"] = [{"name": "default", "template": self.chat_template},
                                         {"name": TOOL_USE, "template": self.tool_template}]
        if self.special_tokens or template:
            text = json.dumps({**self.special_tokens, **template}, indent=2, ensure_ascii=False)
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def read_companions(folder: Path, name: str) -> Companions:
    """The companions in a folder; `name` is the tokenizer's, for messages.

    Raises:
        UserError: a file is damaged.
    """
    config = _read_json(folder / "tokenizer_config.json", name)
    special = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
               if key.endswith("_token") and isinstance(value.get("content") if isinstance(value, dict) else value, str)}
    found = config.get("chat_template")
    templates = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)} \
        if isinstance(found, list) else {"default": found}
    for key, file in (("default", folder / "chat_template.jinja"),
                      (TOOL_USE, folder / "additional_chat_templates" / f"{TOOL_USE}.jinja")):
        templates[key] = _read_template(file, name) or templates.get(key)
    for key, template in templates.items():
        if template is not None and not isinstance(template, str):
            raise UserError(f"data.tokenizer={name}: its chat template '{key}' is {str(template)[:80]!r}, not text; mend "
                            "chat_template in tokenizer_config.json")
    ends = _read_json(folder / "generation_config.json", name).get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int) and 0 <= end < LARGEST_ID]
    return Companions(special, templates["default"], templates[TOOL_USE] if templates["default"] else None, tuple(ends))


def _read_template(path: Path, name: str) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer={name}: {path} cannot be read ({error}); mend or remove it") from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data.tokenizer={name}: {path} is damaged ({error}); mend or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"data.tokenizer={name}: {path} holds no settings; mend or remove it")
    return content
