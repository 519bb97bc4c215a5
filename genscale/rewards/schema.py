"""JSON Schema (draft 2020-12, https://json-schema.org/draft/2020-12): the keywords that say what a value is.

Keywords that lead elsewhere (`$ref`), or mean little without (`format`), are refused by name: a check that is passed over
would reward what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from genscale.errors import UserError, nearest
from genscale.reading import MAX_DEPTH, deeper
from genscale.rewards.patterns import compiled, matches

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict), "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str), "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None, "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == value // 1,
}
_OF_NUMBERS: dict[str, Callable[[float, float], bool]] = {
    "minimum": lambda value, limit: value >= limit, "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit, "exclusiveMaximum": lambda value, limit: value < limit,
    "multipleOf": lambda value, limit: _is_multiple(value, limit),
}
_OF_SIZES = {"minLength": str, "maxLength": str, "minItems": list, "maxItems": list, "minProperties": dict,
             "maxProperties": dict}
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_NOTES = ("$schema", "$id", "$comment", "title", "description", "default", "examples")
KEYWORDS = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "uniqueItems", "pattern", "not",
            *_OF_NUMBERS, *_OF_SIZES, *_ALTERNATIVES)
SECONDS = 2.0
"""CPU time for one `pattern` on one text."""


def check_schema(schema: Any, key: str) -> None:
    """Raises UserError for what is no schema, or a keyword that is not known here; the message begins with the key."""
    if deeper(schema, MAX_DEPTH):
        raise UserError(f"{key}: is nested more than {MAX_DEPTH} levels deep")
    _check(schema, key)


def _check(schema: Any, key: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{key}: must be a mapping like {{type: object}}, not {schema!r:.80}")
    for word, value in schema.items():
        if word not in KEYWORDS + _NOTES:
            raise UserError(f"{key}.{word}: is no keyword that is heeded here{nearest(str(word), KEYWORDS)}; those are "
                            f"{', '.join(KEYWORDS)}")
        if word not in _NOTES and (wanted := _wrong(word, value)):
            raise UserError(f"{key}.{word}: must be {wanted}, not {value!r:.80}")
        if word == "pattern":
            compiled(value, f"{key}.pattern")
        elif word in ("additionalProperties", "items", "not"):
            _check(value, f"{key}.{word}")
        elif word == "properties":
            for name, each in value.items():
                _check(each, f"{key}.properties.{name}")
        elif word in _ALTERNATIVES:
            for number, each in enumerate(value):
                _check(each, f"{key}.{word}[{number}]")


def _wrong(word: str, value: Any) -> str:
    """What the value of a keyword must be, where it is not."""
    if word == "type":
        kinds = value if isinstance(value, list) else [value]
        return "" if kinds and all(isinstance(kind, str) and kind in TYPES for kind in kinds) else f"one of {', '.join(TYPES)}"
    if word == "properties":
        return "" if isinstance(value, dict) else "a mapping"
    if word in ("enum", *_ALTERNATIVES):
        return "" if isinstance(value, list) and value else "a list"
    if word == "required":
        return "" if isinstance(value, list) and all(isinstance(name, str) for name in value) else "a list of names"
    if word == "uniqueItems":
        return "" if isinstance(value, bool) else "true or false"
    if word == "pattern":
        return "" if isinstance(value, str) else "a regular expression"
    if word in _OF_NUMBERS:
        return "" if _is_number(value) and (word != "multipleOf" or value > 0) else "a number"
    if word in _OF_SIZES:
        return "" if _is_number(value) and value == value // 1 and value >= 0 else "a whole number"
    return ""


def fits(value: Any, schema: Any) -> bool:
    """Whether a value of JSON fits a schema that `check_schema` has passed. Raises UserError where a pattern takes too long.

    >>> fits([1, 2], {"type": "array", "items": {"minimum": 2}})
    False
    """
    if isinstance(schema, bool):
        return schema
    return all(_holds(value, word, limit, schema) for word, limit in schema.items())


def _holds(value: Any, word: str, limit: Any, schema: Mapping[str, Any]) -> bool:
    if word == "type":
        return any(TYPES[kind](value) for kind in (limit if isinstance(limit, list) else [limit]))
    if word == "enum":
        return any(_same(value, each) for each in limit)
    if word == "const":
        return _same(value, limit)
    if word == "not":
        return not fits(value, limit)
    if word in _ALTERNATIVES:
        right = sum(fits(value, each) for each in limit)
        return right == len(limit) if word == "allOf" else right >= 1 if word == "anyOf" else right == 1
    if word in _OF_NUMBERS:
        return not _is_number(value) or _OF_NUMBERS[word](value, limit)
    if word in _OF_SIZES:
        size = len(value) if isinstance(value, _OF_SIZES[word]) else limit  # which says nothing of other values
        return size >= limit if word.startswith("min") else size <= limit
    return _holds_inside(value, word, limit, schema)


def _holds_inside(value: Any, word: str, limit: Any, schema: Mapping[str, Any]) -> bool:
    """The keywords of objects, lists and texts, which say nothing of other values."""
    if isinstance(value, dict):
        if word == "properties":
            return all(fits(value[name], each) for name, each in limit.items() if name in value)
        if word == "additionalProperties":
            return all(fits(each, limit) for name, each in value.items() if name not in schema.get("properties", {}))
        if word == "required":
            return all(name in value for name in limit)
    if isinstance(value, list):
        if word == "items":
            return all(fits(each, limit) for each in value)
        if word == "uniqueItems" and limit:
            return len({_canonical(each) for each in value}) == len(value)
    if isinstance(value, str) and word == "pattern":
        return matches(compiled(limit, "schema.pattern"), value, "schema.pattern", SECONDS)
    return True


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value))


def _is_multiple(value: float, limit: float) -> bool:
    """Whether it is one, of floats to twelve digits; what is larger than a float holds is none."""
    if isinstance(value, int) and isinstance(limit, int):
        return value % limit == 0
    try:
        return math.isclose(value / limit, round(value / limit), rel_tol=1e-12)
    except OverflowError:
        return False


def _same(value: Any, other: Any) -> bool:
    return _canonical(value) == _canonical(other)


def _canonical(value: Any) -> str:
    """One text for values that JSON holds to be equal: 1 and 1.0 are, 1 and true are not."""
    def plain(each: Any) -> Any:
        if isinstance(each, dict):
            return {str(name): plain(own) for name, own in each.items()}
        if isinstance(each, list):
            return [plain(own) for own in each]
        return int(each) if isinstance(each, float) and math.isfinite(each) and each == each // 1 else each

    return json.dumps(plain(value), sort_keys=True)
