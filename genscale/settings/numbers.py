"""Numbers of a config are those of YAML 1.2, in a file and after a flag alike: `010` is ten, `1e3` a thousand, `0x10` sixteen,
and `1_000`, `1:30` or digits of another script are none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from genscale.errors import UserError, shortened
from genscale.reading import Unreadable, parse_yaml
from genscale.settings.keys import as_key

WHOLE_NUMBERS = 2**63 - 1
"""What fits wherever they go."""


def number_keys(sections: Mapping[str, type]) -> set[str]:
    """The settings, as `section.key`, that are numbers or lists of numbers."""
    return {f"{name}.{key}" for name, section in sections.items() for key in numbers_of(section)}


def numbers_of(section: type) -> set[str]:
    """The same of one dataclass, without its name."""
    return {as_key(key) for key, kind in get_type_hints(section).items() if _is_number(kind)}


def _is_number(kind: Any) -> bool:
    kinds = list(_leaves(get_args(kind)[-1] if get_origin(kind) is dict else kind))
    return str not in kinds and any(issubclass(each, (int, float)) and each is not bool for each in kinds)


def _leaves(kind: Any) -> Iterator[type]:
    for each in get_args(kind) or [kind]:
        if get_args(each):
            yield from _leaves(each)
        elif isinstance(each, type):
            yield each


def check_numbers(content: Mapping[str, Any], keys: set[str], prefix: str = "") -> None:
    """Raises UserError for a number of a file that only Python would take for one."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path in keys:
            _check(path, value)
        elif isinstance(value, dict):
            check_numbers(value, keys, f"{path}.")


def _check(path: str, value: Any) -> None:
    if isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            _check(path, each)
    elif isinstance(value, str) and _number(value) is None and any(map(str.isdigit, value)):
        raise UserError(f"{path}: must be a number, not {shortened(repr(value))}, which is a text in YAML 1.2; write it in "
                        "plain digits")
    elif isinstance(value, int) and abs(value) > sys.float_info.max:  # which nothing reckons with
        raise UserError(f"{path}: must be at most {WHOLE_NUMBERS}, not {shortened(str(value))}")


def with_plain_numbers(arguments: Sequence[str], keys: set[str]) -> list[str]:
    """The words of a command line with the numbers after flags as Python writes them. Raises UserError as `check_numbers`."""
    words: list[str] = []
    flag: str | None = None
    for word in arguments:
        name, equals, value = word.partition("=")
        is_flag = word.startswith("--")
        if is_flag and equals and name[2:] in keys:
            word = f"{name}={_plain(name[2:], value)}"
        elif flag is not None and flag in keys and not is_flag:
            word = _plain(flag, word)
        flag = word[2:] if is_flag and not equals else None
        words.append(word)
    return words


def _plain(path: str, text: str) -> str:
    number = _number(text)
    if number is None:
        try:
            value = parse_yaml(text) if text.startswith(("[", "{")) else text
        except Unreadable as error:
            raise UserError(f"{path}: {shortened(text)} {error}") from None
        _check(path, value)
        return text
    _check(path, number)
    return str(int(number)) if number == number // 1 and abs(number) <= WHOLE_NUMBERS else repr(number)


def _number(text: str) -> int | float | None:
    """What YAML takes the text for; None where that is no number."""
    try:
        value = parse_yaml(text)
    except Unreadable:
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
