"""Files of text, JSON lines and parquet as Arrow tables, from any place on: a place is found again by seeking, not by reading.

A file of lines is read in blocks that follow each other from its start, so that a block is the same wherever reading begins;
its place is the byte at which it starts. In parquet the row alone says which row group to begin with.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from genscale.data.source_file import SourceFile

CHUNK = 2**20
"""Bytes in a block, and up to the end of its last line: every lane keeps as many in memory."""
ROWS = 64
"""Rows of parquet in memory at a time, for each lane: few, for a document may be a book."""
PARAGRAPHS = re.compile(rb"(?>\r\n|\r|\n){2}")

At = list[int]
"""(byte at which a block starts, number of its first row)."""


class Rows(NamedTuple):
    """Consecutive rows of a file.

    Attributes:
        first: number of the first one.
        at: where to begin to reach them; None where their numbers tell.
        table: an Arrow table.
    """

    first: int
    at: At | None
    table: Any


def text_rows(file: SourceFile, document: str, at: At | None = None) -> Iterator[Rows]:
    """The lines, the paragraphs or the whole of a text file, in a column `text`.

    Raises:
        UnicodeDecodeError: it is no UTF-8.
    """
    import pyarrow as pa

    offset, first = at or (0, 0)
    with file.open(offset) as stream:
        if document == "file":
            yield Rows(0, None, pa.table({"text": [_plain(stream.read())]}))
            return
        rest = b""
        # What is left of a block counts towards the next, which is then the same for a reader that begins there.
        while block := _block(stream, CHUNK - len(rest) if len(rest) < CHUNK else CHUNK):
            raw = rest + block
            if document == "line":
                texts = _plain(raw).removesuffix("\n").split("\n")
            else:
                *ended, rest = PARAGRAPHS.split(raw) if b"\r" in raw else raw.split(b"\n\n")
                texts = [_plain(paragraph) for paragraph in ended if paragraph]
            yield Rows(first, [offset, first], pa.table({"text": pa.array(texts, pa.string())}))
            first, offset = first + len(texts), offset + len(raw) - len(rest)
        if rest:
            yield Rows(first, [offset, first], pa.table({"text": [_plain(rest)]}))


def _plain(raw: bytes) -> str:
    """Text with the line ends of all systems as one."""
    return raw.decode().replace("\r\n", "\n").replace("\r", "\n")


def _blocks(stream: Any) -> Iterator[bytes]:
    while block := _block(stream, CHUNK):
        yield block


def _block(stream: Any, size: int) -> bytes:
    """So many bytes, and what follows up to the end of the line."""
    block = stream.read(size)
    return block if block.endswith(b"\n") else block + stream.readline()


def json_rows(file: SourceFile, columns: Sequence[str], at: At | None = None) -> Iterator[Rows]:
    """The rows of a file of JSON lines. Its first block says what the columns are: later values are brought to its types, and
    a column that is missing in a later block has no values there.

    Raises:
        ValueError: it is no JSON, or a value is of another type.
    """
    import pyarrow as pa

    offset, first = at or (0, 0)
    types: dict[str, Any] = {}
    if offset:
        with file.open() as stream:
            found = next((table for block in _blocks(stream) if (table := _json_table(block, columns)) is not None), None)
            types = {} if found is None else dict(zip(found.column_names, found.schema.types, strict=True))
    with file.open(offset) as stream:
        for block in _blocks(stream):
            if not offset and block.lstrip()[:1] == b"[":  # one JSON array
                block = b"\n".join(json.dumps(row).encode() for row in json.loads(block + stream.read()))
            table = _json_table(block, columns)
            if table is not None:
                if types:
                    table = pa.table({name: _cast(table, name, types[name]) for name in columns if name in types})
                else:
                    types = dict(zip(table.column_names, table.schema.types, strict=True))
                yield Rows(first, [offset, first], table)
                first += len(table)
            offset += len(block)


def _json_table(block: bytes, columns: Sequence[str]) -> Any:
    """The rows of a block; None where it has none."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    if not block.strip():
        return None
    try:
        # One block for Arrow too: no line may lie across two of them.
        return arrow_json.read_json(io.BytesIO(block), read_options=arrow_json.ReadOptions(False, len(block) + 1))
    except pa.ArrowInvalid as error:
        if ") changed from" not in str(error):
            raise
        # A column has values of several types; that is no matter where it is another than those that are asked for.
        rows = [json.loads(line) for line in block.splitlines() if line.strip()]
        names = dict.fromkeys(name for row in rows for name in row)
        wanted = [name for name in columns if name in names] or list(names)[:1]
        try:
            return pa.table({name: pa.array([row.get(name) for row in rows]) for name in wanted})
        except pa.ArrowException:
            raise error from None


def _cast(table: Any, name: str, wanted: Any) -> Any:
    import pyarrow as pa

    if name not in table.column_names:
        return pa.nulls(len(table), wanted)
    column = table[name]
    if column.type == wanted or pa.types.is_null(wanted) or pa.types.is_nested(wanted) or pa.types.is_nested(column.type):
        return column
    return column.cast(wanted)


def parquet_rows(file: SourceFile, columns: Sequence[str], check: Callable[[list[str]], None], group: int | None,
                 start: int = 0, at_once: int = ROWS) -> Iterator[Rows]:
    """The rows of a parquet file, or of one of its row groups, from the row group on in which row `start` is.

    Args:
        check: is given the names of all columns before `columns` are read.
        at_once: rows of a table at most.

    Raises:
        pyarrow.ArrowException: it is damaged.
    """
    import pyarrow as pa

    with open_parquet(file) as opened:
        check(opened.schema_arrow.names)
        columns = [name for name in columns if name in opened.schema_arrow.names]
        first = 0
        for number in range(opened.num_row_groups) if group is None else [group]:
            count = opened.metadata.row_group(number).num_rows
            if first + count > start:
                at = first
                for batch in opened.iter_batches(at_once, [number], columns, use_threads=False):
                    yield Rows(at, None, pa.Table.from_batches([batch]))
                    at += len(batch)
            first += count


@contextmanager
def open_parquet(file: SourceFile) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. (A compressed file is held in memory.)"""
    import pyarrow.parquet as pq

    with file.open() as stream:
        yield pq.ParquetFile(stream if file.seekable else io.BytesIO(stream.read()), buffer_size=CHUNK)
