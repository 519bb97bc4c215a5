"""Passwords and tokens are kept out of what is written: config.yaml, checkpoints, logs, messages, what trackers are given."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST = 8  # characters of a variable's value that is taken for a secret
_PASSWORD = re.compile(r"(\bhttps?://)[^/\s?#@'\"]*@")
# As in ?token=..., &X-Amz-Signature=..., &sig=... (Azure), &Key-Pair-Id=... (CloudFront).
_NAMES = (r"(?:[^=&#\s]*(?:token|secret|passw|pwd|signature|credential|api[-_]?key|access[-_]?key|key-pair-id)[^=&#\s]*"
          r"|sig|key|auth|authorization|policy)")
_QUERY = re.compile(rf"([?&]{_NAMES}=)(?:[^&#\s'\",;:)\]}}]|:(?=\S))+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with `***` in the place of passwords and tokens in web addresses, and of the secrets of this environment."""
    if "://" in text:
        text = _QUERY.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1{MASK}@", text))
    for name in SECRET_VARIABLES:
        if len(value := os.environ.get(name, "")) >= SHORTEST:
            text = text.replace(value, MASK)
    return text


def masked_throughout(value: Any) -> Any:
    """The same of every text in lists and dicts; other values as they are."""
    if isinstance(value, dict):
        return {key: masked_throughout(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(masked_throughout(item) for item in value)
    return masked(value) if isinstance(value, str) else value


def has_password(text: str) -> bool:
    """Whether it is a web address with a user's name or password in it."""
    return _PASSWORD.match(text) is not None


def has_mask(text: str) -> bool:
    """Whether a secret in it was masked, so that it leads nowhere."""
    return MASK in text and "://" in text
