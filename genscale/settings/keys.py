"""How settings are called: by their field's name, but for those whose name Python keeps for itself.

Such a setting (`model.from`) has a field that ends in an underscore (`from_`), which is put in where the user's words are read
and taken out of all that the user reads.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from typing import Any

_FIELD = re.compile(r"(?<![\w.])((?:--)?\w+\.)(" + "|".join(keyword.kwlist) + r")_(?!\w)")


def as_field(key: str) -> str:
    """`from` as `from_`; other names as they are."""
    return f"{key}_" if keyword.iskeyword(key) else key


def as_key(field: str) -> str:
    """`from_` as `from`; other names as they are."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def renamed(content: Any, rename: Callable[[str], str]) -> Any:
    """The same sections with other keys for their settings; what lies deeper (the columns of filters) is the user's own."""
    if not isinstance(content, dict):
        return content
    return {section: {rename(key) if isinstance(key, str) else key: value for key, value in settings.items()}
            if isinstance(settings, dict) else settings for section, settings in content.items()}


def in_users_words(text: str) -> str:
    """A text of jsonargparse with the settings called as the user knows them."""
    return _FIELD.sub(r"\1\2", text)
