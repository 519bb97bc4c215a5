"""What is text in parquet and .txt files, whatever the type or the mark that it is written with; else one line with the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data import file_tables
from genscale.data.readers import Spec, TableShard
from genscale.data.source_file import SourceFile
from genscale.data.spec import parse_filters
from genscale.errors import UserError

TEXTS = ["one é", "two", None, "one é", " ", "three 東"]


def shard(path: Path, **spec: Any) -> TableShard:
    return TableShard(path.name, path.stat().st_size, Spec("data.source", str(path), **spec),
                      SourceFile.local(path, f"data.source={path}"))


def read(path: Path, **spec: Any) -> list[str]:
    return [row.document for row in shard(path, **spec).rows()]


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.binary(), pa.large_binary(),
    pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.int32(), pa.large_string()),
], ids=str)
def test_text_of_every_type_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    binary = "binary" in str(inner)
    column = pa.array([text if text is None or not binary else text.encode() for text in TEXTS], inner)
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column
    pq.write_table(pa.table({"text": column, "answer": column}), path)
    assert read(path) == ["one é", "two", "one é", "three 東"]
    assert [row.document for row in shard(path).rows(1, 1, 2)] == ["two", "one é", "three 東"]
    assert read(path, filters=parse_filters("data.filters", {"answer": "two"})) == ["two"]
    pairs = read(path, prompt="text", answer="answer", filters=parse_filters("data.filters", {"answer": ["two", "three 東"]}))
    assert [json.loads(pair)[1]["content"] for pair in pairs] == ["two", "three 東"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_bytes_that_are_no_text_are_named(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([b"right", b"caf\xe9", b"right"], pa.binary())
    column = column if kind == pa.binary() else pa.StringArray.from_buffers(3, *column.buffers()[1:])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="data.column=text: row 1 of a.parquet holds bytes that are no text .'utf-8' codec"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([["a"], []]), pa.array([True, None])])
def test_what_is_no_text_is_refused(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="data.column=text: in a.parquet it holds .*, not text"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="data.column=text: a.parquet of .* has 2 columns of that name"):
        read(tmp_path / "a.parquet")


def test_messages_have_the_keys_that_they_were_written_with(tmp_path: Path) -> None:
    """Arrow gives every struct the keys of all; a list keeps its nulls, and a map is an object."""
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [
                {"name": "weather", "arguments": {"city": "Rome", "days": [1, None]}}]}],
            [{"role": "assistant", "content": "c", "tool_calls": [{"name": "clock", "arguments": {"zone": "UTC"}}]}]]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": rows}), path)
    assert [json.loads(text) for text in read(path, messages="messages")] == rows
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.binary(), "tags": pa.map_(pa.string(), pa.int64())}))
    messages = [[{"role": "assistant", "content": b"b", "tags": [("x", 1), ("y", None)]}]]
    pq.write_table(pa.table({"messages": pa.array(messages, kind)}), path)
    assert json.loads(read(path, messages="messages")[0]) == [
        {"role": "assistant", "content": "b", "tags": {"x": 1, "y": None}}]


@pytest.mark.parametrize("size", [5, 2**20])
@pytest.mark.parametrize(("document", "expected"), [
    ("line", ["one", "two é", "\ufeffthree"]), ("paragraph", ["one\ntwo é\n\ufeffthree\n"]),
    ("file", ["one\ntwo é\n\ufeffthree\n"]),
])
def test_the_byte_order_mark_of_a_text_file_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str,
                                                       expected: list[str], size: int) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", size)
    path = tmp_path / "a.txt"
    path.write_text("one\r\ntwo é\n\ufeffthree\n", encoding="utf-8-sig", newline="")
    rows = list(shard(path, document=document).rows())
    assert [row.document for row in rows] == expected
    assert list(shard(path, document=document).rows(rows[-1].number, at=rows[-1].at)) == rows[-1:]
    path.write_text("", encoding="utf-8-sig")
    assert read(path, document=document) == []


@pytest.mark.parametrize(("document", "row"), [("line", 3), ("paragraph", 1), ("file", 0)])
def test_text_that_is_no_utf8_is_named(tmp_path: Path, document: str, row: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=rf"a.txt is damaged or not what its name says .row {row} is no text .'utf-8' codec"):
        read(tmp_path / "a.txt", document=document)
