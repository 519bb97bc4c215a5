"""What JSON says, value for value: objects one after the other, each on a line of its own or over several, or in one array.

Lines are read by orjson. It stops at what is not one whole value on its line, and such text goes to the `json` of Python, which
knows where a value ends; so does what orjson would change in silence (integers beyond 64 bits, the first of two equal keys).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from types import NoneType
from typing import Any, NamedTuple

import orjson

BOM = codecs.BOM_UTF8
DEEPEST = 200
"""Lists and objects inside each other in a value that is read."""
BETWEEN = re.compile(r"[ \t\r\n]*")
DIGITS = bytes(ord("0") if chr(byte).isdigit() else ord(" ") for byte in range(128)) + b" " * 128
LONG = b"0" * 19
"""Digits of the integers that reach 64 bits, as `DIGITS` translates them."""
UNFINISHED = 12
"""Characters before the end of a text at which its last token may begin that is cut off: an escaped pair of surrogates."""


class BadRow(ValueError):
    """A row that cannot be read; the message begins with its number."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")


@dataclass(frozen=True)
class Values:
    """The wanted columns of some rows as Python values; None where a row lacks the key.

    Attributes:
        names: the keys of the rows so far.
        missing: whether some of the columns have not yet come in the file.
    """

    columns: dict[str, list[Any]]
    names: list[str]
    missing: bool

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class Objects(NamedTuple):
    """The objects that lie whole in some bytes, the number of bytes that they take, and whether the array that holds them ends
    there."""

    rows: list[dict[str, Any]]
    size: int
    closed: bool = False


def shown(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def objects(raw: bytes, first: int, columns: Sequence[str], last: bool) -> Objects:
    """The objects that follow each other in lines of a file.

    Args:
        raw: whole lines.
        first: number of the first row in them.
        columns: what is wanted of the rows.
        last: whether the file ends with them.

    Raises:
        BadRow: a row that is no JSON object.
    """
    keys = [json.dumps(name, ensure_ascii=False).encode() for name in columns]
    rows, size = _lines(raw, first)
    certain = raw if size == len(raw) else raw[:size]
    twice, inexact = False, False
    kinds: set[type] = set()
    for name, key in zip(columns, keys, strict=True):
        values = column_of(rows, name)
        found = set(map(type, values))
        given = len(rows) if NoneType not in found else [name in row for row in rows].count(True)
        twice = twice or certain.count(key) > given
        inexact = inexact or (float in found and any(type(value) is float and abs(value) >= 2**63 for value in values))
        kinds |= found
    if twice or ((inexact or list in kinds or dict in kinds) and _rounded(certain)):
        _read_again(certain, rows, first, columns, keys)
    if size == len(raw):
        return Objects(rows, size)
    after = decoded(raw[size:], first + len(rows), columns, last)
    return Objects(rows + after.rows, size + after.size)


def column_of(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """The values of a key; None where a row lacks it."""
    try:
        return list(map(itemgetter(name), rows))
    except KeyError:
        return [row.get(name) for row in rows]


def _lines(raw: bytes, first: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of the first lines, as far as each holds one; and the bytes of these lines."""
    lines, loads = raw.split(b"\n"), orjson.loads
    with suppress(orjson.JSONDecodeError):
        rows = list(map(loads, filter(None, lines)))
        if {dict}.issuperset(map(type, rows)):
            return rows, len(raw)
    rows, size = [], 0  # something is no object on a line of its own: which?
    for line in lines:
        if line and not line.isspace():
            try:
                row = loads(line)
            except orjson.JSONDecodeError:
                return rows, size
            if type(row) is not dict:
                raise _no_object(first + len(rows), row)
            rows.append(row)
        size += len(line) + 1
    return rows, len(raw)


def _rounded(raw: bytes) -> bool:
    """Whether there may be an integer that orjson makes a float of."""
    digits, start = raw.translate(DIGITS), 0
    while (start := digits.find(LONG, start)) >= 0:
        before, end = raw[start - 1 : start], digits.find(b" ", start)
        if before not in b'."' and (end - start > len(LONG) or before == b"-"):  # no decimals, nor the beginning of a text
            return True
        start = max(end, start + 1)
    return False


def _read_again(raw: bytes, rows: list[dict[str, Any]], first: int, columns: Sequence[str], keys: Sequence[bytes]) -> None:
    """Put what Python's `json` reads into the place of rows that may spell a key twice, or hold a number that was rounded."""
    lines = (line for line in raw.split(b"\n") if line and not line.isspace())
    for number, line in enumerate(lines):
        if any(line.count(key) > 1 for key in keys) or _rounded(line):
            rows[number] = decoded(line, first + number, columns, last=True).rows[0]


def decoded(raw: bytes, first: int, columns: Sequence[str], last: bool, array: bool = False) -> Objects:
    """The same for objects of any layout. What is no whole object yet at the end is left, but not of the `last` bytes.

    Args:
        array: whether `raw` is what follows the opening bracket of an array, or row `first` - 1 in one.

    Raises:
        BadRow: a row that is no JSON object.
    """
    text, _ = codecs.utf_8_decode(raw, "surrogateescape", last)
    rows: list[dict[str, Any]] = []
    at = end = 0
    closed = False
    try:
        while not closed and (at := _past_blanks(text, at)) < len(text):
            end = at
            if array and text[at] == "]":
                closed, at = True, at + 1
            else:
                if array and first + len(rows):
                    at = _after_comma(text, at)
                start, (row, at) = at, DECODER.raw_decode(text, at)
                rows.append(_checked(row, first + len(rows), columns, text[start:at]))
        end = at
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - UNFINISHED
        cut = cut and text[error.pos : error.pos + 1] not in ("]", "}")  # after a comma
        if last and cut:
            raise BadRow(first + len(rows), "is cut short: the file ends inside it") from None
        if last or not cut:
            found = json.dumps(text[error.pos : error.pos + 30])
            raise BadRow(first + len(rows), f"is no JSON ({error.msg} at {found})") from None
    except RecursionError:
        raise _too_deep(first + len(rows)) from None
    except BadRow:
        raise
    except ValueError as error:  # a key twice, a number of thousands of digits
        raise BadRow(first + len(rows), f"is not read ({error})") from None
    if last and array and not closed:
        raise BadRow(first + len(rows), "is not there: the file is cut short, and ends before its array does")
    return Objects(rows, len(text[:end].encode("utf-8", "surrogateescape")), closed)


def _after_comma(text: str, at: int) -> int:
    if text[at] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return _past_blanks(text, at + 1)


def _past_blanks(text: str, at: int) -> int:
    found = BETWEEN.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _checked(row: Any, number: int, columns: Sequence[str], raw: str) -> dict[str, Any]:
    """The row, if it is one whose wanted values can be text."""
    if not isinstance(row, dict):
        raise _no_object(number, row)
    for name in columns:
        try:
            json.dumps(row.get(name), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            what = "bytes that are no UTF-8" if (found := error.object[error.start]) in raw else (
                f"\\u{ord(found):04x}, half of a character (a lone surrogate)")
            raise BadRow(number, f"holds {what}, in {name!r}") from None
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_object(number: int, value: Any) -> BadRow:
    return BadRow(number, f"holds {shown(value)}, not an object like {{\"text\": ...}}")


def _too_deep(number: int) -> BadRow:
    return BadRow(number, f"is nested deeper than the {DEEPEST} lists and objects that are read")


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
