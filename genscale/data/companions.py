"""What the files beside a `tokenizer.json` in a Hugging Face folder add to it: named special tokens and a chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.reading import read_json


@dataclass(frozen=True)
class Companions:
    """What the files beside a `tokenizer.json` add to it.

    Attributes:
        special_tokens: name (`eos_token`, `bos_token`, ...) -> its text, as `tokenizer_config.json` has it.
        chat_template: Jinja source by which a conversation is written as text, or None.
        end_ids: ids that end a generation, as `generation_config.json` has them.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    end_ids: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write what there is to `tokenizer_config.json`."""
        template = {"chat_template": self.chat_template} if self.chat_template else {}
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
               if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ends = _read_json(folder / "generation_config.json", name).get("eos_token_id") or []
    return Companions(special, template, tuple(ends if isinstance(ends, list) else [ends]))


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer={name}: {path} is damaged ({error}); mend or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"data.tokenizer={name}: {path} holds no settings; mend or remove it")
    return content
