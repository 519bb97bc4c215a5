"""The rows of files of text, JSON lines and parquet, from any place on: a place is found again by seeking, not by reading.

A file of lines is read in blocks that follow each other from its start, so that a block is the same wherever reading begins;
its place is the byte at which it starts. In parquet the row alone says which row group to begin with.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from genscale.data.json_values import BOM, BadRow, Values, column_of, decoded, objects
from genscale.data.source_file import SourceFile, TooLarge

CHUNK = 2**20
"""Bytes in a block, and up to the end of its last line: every lane keeps as many in memory."""
ROWS = 64
"""Rows of parquet in memory at a time, for each lane: few, for a document may be a book."""
AHEAD = 256 * 2**20
"""Bytes of a JSON file in which a column must have come."""
NAMES = 1000
"""Names of columns kept for a message."""
HELD = 2**30
"""Bytes of a compressed parquet file that are held in memory, where nothing else is said."""
REPETITIVE = 16
"""Times that a column chunk of parquet grows from which on it is read with care; text grows to a few times its size."""
PARAGRAPHS = re.compile(rb"(?>\r\n|\r|\n){2}")

NEWLINE = b"\n"

At = list[int]
"""(byte at which a block starts, number of its first row), and a 1 inside a JSON array."""


class Rows(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        first: number of the first one.
        at: where to begin to reach them; None where their numbers tell.
        table: an Arrow table, or `Values`.
    """

    first: int
    at: At | None
    table: Any


def text_rows(file: SourceFile, document: str, most: int, at: At | None = None) -> Iterator[Rows]:
    """The lines, the paragraphs or the whole of a text file, as `Values` of a column `text`. A byte order mark is no text.

    Args:
        most: bytes of the longest document.

    Raises:
        BadRow: it is no UTF-8.
        TooLarge: a document is longer.
    """
    offset, first = at or (0, 0)
    with file.open(offset, most) as stream:
        if document == "file":
            yield Rows(0, None, text_values([_plain(_whole(stream, most).removeprefix(BOM), 0)]))
            return
        rest = b""
        # What is left of a block counts towards the next, which is then the same for a reader that begins there.
        while block := stream.read(CHUNK - len(rest) if _within(len(rest), first, most) < CHUNK else CHUNK):
            raw = rest + _to_line_end(stream, block, first, most)
            text = raw if offset else raw.removeprefix(BOM)
            if document == "line":
                texts = _plain(text, first, True).removesuffix("\n").split("\n")
            else:
                *ended, rest = PARAGRAPHS.split(text) if b"\r" in text else text.split(b"\n\n")
                texts = [_plain(paragraph, first + i) for i, paragraph in enumerate(filter(None, ended))]
            yield Rows(first, [offset, first], text_values(texts))
            first, offset = first + len(texts), offset + len(raw) - len(rest)
        if rest:
            yield Rows(first, [offset, first], text_values([_plain(rest, first)]))


def text_values(texts: list[str]) -> Values:
    """As a column `text`. (Of Python's values Arrow makes a table only after it has loaded pandas.)"""
    return Values({"text": texts}, ["text"], False)


def _plain(raw: bytes, row: int, lines: bool = False) -> str:
    """Text with the line ends of all systems as one. `row` is the number of the first one in it, for messages."""
    try:
        return raw.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise BadRow(row + (raw.count(NEWLINE, 0, error.start) if lines else 0), f"is no text ({error})") from None


def _whole(stream: Any, most: int) -> bytes:
    content = stream.read(most + 1)
    if len(content) > most:
        raise TooLarge("it is held in memory as a whole, and has", most)
    return content


def _within(held: int, row: int, most: int) -> int:
    """The bytes of row `row` that are held, and it has not ended: refused where they are too many."""
    if held > most:
        raise TooLarge(f"row {row} has", most)
    return held


def _to_line_end(stream: Any, block: bytes, row: int, most: int) -> bytes:
    """A block and what follows it up to the end of the line."""
    if block.endswith(b"\n"):
        return block
    begun = len(block) - 1 - block.rfind(b"\n")
    tail = stream.readline(max(most - begun, 0) + 1)
    if begun + len(tail.rstrip(b"\r\n")) > most:
        raise TooLarge(f"the line of row {row + block.count(NEWLINE)} has", most)
    return block + tail


def json_rows(file: SourceFile, columns: Sequence[str], check: Callable[[list[str]], None], most: int,
              at: At | None = None, optional: str | None = None) -> Iterator[Rows]:
    """The rows of a file of JSON objects, as `Values`: JSON lines, objects over several lines, or one array of them.

    Args:
        check: is given the names of all columns where no row of the file, or of its first `AHEAD` bytes, has some of `columns`,
            but for the `optional` one.
        most: bytes of the longest row.

    Raises:
        BadRow: a row is no JSON object.
        TooLarge: a row is longer.
    """
    missing = set() if at and at[0] else {*columns} - {optional}
    names: dict[str, None] = {}
    for first, place, rows in _objects(file, columns, at, most):
        if not names or (missing and len(names) < NAMES):
            names |= dict.fromkeys(name for row in rows for name in row)
        if missing:
            missing = {name for name in missing if not any(name in row for row in rows)}
            if missing and place[0] > AHEAD:
                check(list(names))
        values = Values({name: column_of(rows, name) for name in columns}, list(names), bool(missing))
        rows.clear()  # of what others read now no more is kept than what they asked for
        yield Rows(first, place, values)
    if missing and names:
        check(list(names))


def _objects(file: SourceFile, columns: Sequence[str], at: At | None, most: int) -> Iterator[tuple[int, At, list[dict]]]:
    """The objects of a JSON file by blocks, with the number of the first and the place of the block."""
    offset, first, *array = at or (0, 0)
    raw, last, closed = b"", False, False
    rows: list[dict[str, Any]]
    with file.open(offset, most) as opened:
        stream = _Pushback(opened)
        while not last:
            # As much again: a long row is looked at a few times, and not once a block.
            size = min(_within(len(raw), first, most), most + 1 - len(raw)) or CHUNK
            block = stream.read(size)
            last, begun = len(block) < size, 0
            if not offset:
                array, begun = _opening(raw or block)
            raw += block if array or last else _to_line_end(stream, block, first, most)
            if closed:
                rows, size = [], 0
            elif array:
                rows, size, closed = decoded(raw[begun:], first, columns, last, array=True)
            else:
                rows, size, _ = objects(raw[begun:], first, columns, last)
            place, number = [offset, first, *array], first
            if size:
                # What is left is read again with what follows, as by a reader that begins there.
                offset, first, last = offset + begun + size, first + len(rows), last and begun + size == len(raw)
                stream.unread(raw[begun + size :])
                raw = b""
            if closed and raw.strip():
                raise BadRow(first, "stands after the end of the array")
            if rows:
                yield number, place, rows


class _Pushback:
    """A stream that takes back what was read of it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._back = stream, b""

    def unread(self, raw: bytes) -> None:
        self._back = raw + self._back

    def read(self, size: int) -> bytes:
        piece, self._back = self._back[:size], self._back[size:]
        return piece if len(piece) == size else piece + self._stream.read(size - len(piece))

    def readline(self, size: int) -> bytes:
        end = self._back.find(NEWLINE, 0, size) + 1
        if end or len(self._back) >= size:
            return self.read(end or size)
        piece, self._back = self._back, b""
        return piece + self._stream.readline(size - len(piece))


def _opening(raw: bytes) -> tuple[list[int], int]:
    """What marks the places of a file that begins so: [1] for an array, else nothing; and the bytes before its first row."""
    body = raw.removeprefix(BOM)
    array = body.lstrip()[:1] == b"["
    return ([1], len(raw) - len(body.lstrip()) + 1) if array else ([], len(raw) - len(body))


def parquet_rows(file: SourceFile, columns: Sequence[str], check: Callable[[list[str]], None], group: int | None,
                 most: int, start: int = 0, at_once: int = ROWS) -> Iterator[Rows]:
    """The rows of a parquet file, or of one of its row groups, from the row group on in which row `start` is.

    Args:
        check: is given the names of all columns before `columns` are read.
        at_once: rows of a table at most.
        most: bytes of the longest row, and see `open_parquet`.

    Raises:
        pyarrow.ArrowException: it is damaged.
        TooLarge: a row has more than `most` bytes, as far as is seen before; and see `open_parquet`.
    """
    import pyarrow as pa

    with open_parquet(file, most) as opened:
        check(opened.schema_arrow.names)
        columns = [name for name in columns if name in opened.schema_arrow.names]
        first = 0
        for number in range(opened.num_row_groups) if group is None else [group]:
            count = opened.metadata.row_group(number).num_rows
            if first + count > start:
                at = first
                size = min(at_once, _batch_size(opened.metadata.row_group(number), columns, first, most))
                for batch in opened.iter_batches(size, [number], columns, use_threads=False):
                    if batch.nbytes > most * len(batch):
                        raise TooLarge(f"row {at} has", most)
                    yield Rows(at, None, pa.Table.from_batches([batch]))
                    at += len(batch)
            first += count


def _batch_size(group: Any, columns: Sequence[str], first: int, most: int) -> int:
    """How many rows of a row group to read at a time: fewer where each may be the same huge entry of a dictionary.

    Raises:
        TooLarge: they have more than `most` bytes on the average.
    """
    rows = ROWS
    for chunk in map(group.column, range(group.num_columns)):
        if not any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
            continue
        size = chunk.total_uncompressed_size
        if size > most * max(1, group.num_rows):
            raise TooLarge(f"row {first} has", most)
        if size > REPETITIVE * chunk.total_compressed_size:
            rows = min(rows, max(1, most // size))
    return rows


@contextmanager
def open_parquet(file: SourceFile, most: int = HELD) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. One that was compressed as a whole is held in memory.

    Raises:
        TooLarge: that is more than `most` bytes.
    """
    import pyarrow.parquet as pq

    with file.open(most=most) as stream:
        yield pq.ParquetFile(stream if file.seekable else io.BytesIO(_whole(stream, most)), buffer_size=CHUNK)
