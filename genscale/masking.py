"""Passwords and tokens are kept out of what is written: config.yaml, checkpoints, logs, messages, what trackers are given.

In web addresses they are known by the name of their parameter, or else by their shape: long, and of letters and digits mixed as
no word, date, number or file name is. A parameter that says which file is meant (`id`, `revision`, `sha256`) is left.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote

MASK = "***"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SHORTEST = 8  # characters of a variable's value that is taken for a secret
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]{0,15}://)[^/\s?#'\"]*@", re.IGNORECASE)
_WEB_PASSWORD = re.compile(r"https?://[^/\s?#'\"]*@", re.IGNORECASE)
# As in ?token=..., &X-Amz-Signature=..., &sig=... (Azure), &Key-Pair-Id=... (CloudFront), ;jsessionid=..., #access_token=...
_SECRET_NAME = re.compile(
    r".*(?:token|secret|passw|passcode|pwd|signature|credential|cookie|csrf|xsrf|oauth|api[-_.]?key|access[-_.]?key|key-pair-id"
    r"|session|jwt|hmac|bearer).*|(?:.*[-_.])?(?:key|auth|pw|psw|tok|creds?|(?:access|auth)[-_.]?code)(?:\[\])?"
    r"|authkey|sig|sign|authorization|policy|pass|passphrase|pin|otp|sas|sid|ticket", re.IGNORECASE)
_NAME_OF_A_FILE = re.compile(
    r".*(?:(?<![a-z])id|[a-z_-]id|uuid|guid|file|path|name|revision|commit|version|release|snapshot|checksum|digest|sha\d*|md5|hash"
    r"|etag)|rev|ref|tag|branch|dataset|split|config|subset|doi|cid|oid", re.IGNORECASE)
_PARAMETER = re.compile(r"(?P<start>[?&#;])(?P<name>[^=&#;?\s]*)=(?P<value>(?:[^&#\s'\",;:)\]}]|:(?=\S)|['\",)\]}](?=\w))+)")
_NAME_INSIDE = re.compile(r"(?:^|[~!,;?&#{\"'])\s*([\w.-]{1,64})[\"']?[=:]")
"""Of what a value is made of in turn: as Akamai's exp=...~acl=...~hmac=..., another address, or JSON."""
# Tokens that say what they are: JSON web tokens, and those of Hugging Face, GitHub, GitLab, Slack, OpenAI and Amazon.
_KNOWN_SHAPE = re.compile(r"(?<![A-Za-z0-9])(?:eyJ[\w-]{5,}\.eyJ[\w-]{5,}(?:\.[\w-]*)?|hf_[A-Za-z0-9]{30,}"
                          r"|gh[pousr]_[A-Za-z0-9]{30,}"
                          r"|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[a-z]-[\w-]{10,}|sk-[\w-]{20,}|A[KS]IA[A-Z0-9]{16})"
                          r"(?![A-Za-z0-9])")
_PARTS = re.compile(r"[-_.~+/=:,]+")
_ENDING = re.compile(r"\.[A-Za-z]\w{0,7}$")
_KINDS = re.compile(r"[0-9]+|[a-z]+|[A-Z]+")


def masked(text: str) -> str:
    """The text with `***` in the place of passwords and tokens in addresses, and of the secrets of this environment."""
    if "://" in text:
        text = _PARAMETER.sub(_masked_parameter, _PASSWORD.sub(rf"\1{MASK}@", text))
    text = _KNOWN_SHAPE.sub(MASK, text)
    for name in SECRET_VARIABLES:
        if len(value := os.environ.get(name, "")) >= SHORTEST:
            text = text.replace(value, MASK)
    return text


def _masked_parameter(found: re.Match[str]) -> str:
    name, value = unquote(found["name"]), unquote(found["value"])
    if _SECRET_NAME.fullmatch(name) or (name == "k" and not value.isdecimal()) or (
            not _NAME_OF_A_FILE.fullmatch(name) and looks_secret(value)) or any(
            map(_SECRET_NAME.fullmatch, _NAME_INSIDE.findall(value))):
        return f"{found['start']}{found['name']}={MASK}"
    return found[0]


def looks_secret(value: str) -> bool:
    """Whether a text looks drawn by lot: hexadecimal or base64 of 64 bits or more, a UUID, no words, dates or file names."""
    parts = [part for part in _PARTS.split(value) if part]
    joined = "".join(parts)
    if len(joined) < 16 or not joined.isascii() or not joined.isalnum() or _ENDING.search(value):
        return False
    if re.fullmatch(r"[0-9a-fA-F]{32,}", joined) and not joined.isdecimal() and not joined.isalpha():
        return True
    longest = max(parts, key=len)
    # In words and numbers a kind of character is followed by the same kind; by lot, every second or third one is not.
    turns = len(_KINDS.findall(longest)) - 1
    return len(longest) >= 10 and not longest.isalpha() and not longest.isdecimal() and turns > 0.2 * (len(longest) - 1)


def masked_throughout(value: Any) -> Any:
    """The same of every text in lists and dicts; other values as they are."""
    if isinstance(value, dict):
        return {key: masked_throughout(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(masked_throughout(item) for item in value)
    return masked(value) if isinstance(value, str) else value


def has_password(text: str) -> bool:
    """Whether it is a web address with a user's name or password in it."""
    return _WEB_PASSWORD.match(text) is not None


def has_mask(text: str) -> bool:
    """Whether a secret in it was masked, so that it leads nowhere."""
    return MASK in text and "://" in text
