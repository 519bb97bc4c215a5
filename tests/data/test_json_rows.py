"""JSON files against Python's `json`: every value as it is written, in any layout, from any place on; else one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from genscale.data import file_tables
from genscale.data.readers import Spec, TableShard
from genscale.data.source_file import SourceFile
from genscale.data.spec import parse_filters
from genscale.data.text import sources
from genscale.errors import UserError

TEXTS = ["words", "2021-03-01", "2021-03-01T10:00:00Z", "10:00", "1", "", "é東😀", "a\u2028b\u2029c\x85", "nul \x00", "\\u0041",
         "]\n}"]
ROWS = [{"id": i, "text": TEXTS[i % len(TEXTS)] + f" {i}" * (i % 3), "score": i / 7} for i in range(60)]
TOOLS = [{"city": "Rome"}, {"zone": "UTC", "at": "2024-01-01"}, {"zone": None}, {"n": 2**70}, {"n": -(2**63) - 1},
         {"n": 2**64 - 1, "m": 2**63}, {"x": 0.1, "y": 1e300, "z": -0.0, "e": 5}, {"id": "12345678901234567890123"}, {},
         {"deep": [[{"a": [None, True]}]]}, {"n": 1234567890123456789}]


def shard(path: Path, **spec: Any) -> TableShard:
    return TableShard(path.name, path.stat().st_size, Spec("data.source", str(path), **spec),
                      SourceFile.local(path, f"data.source={path}"))


def texts_of(path: Path, **spec: Any) -> list[str]:
    return [row.document for row in shard(path, **spec).rows()]


def layouts(rows: list[dict]) -> dict[str, str]:
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    return {"lines": "\n".join(lines), "crlf": "\r\n".join(lines) + "\r\n", "blank lines": "\n \n\n".join(lines) + "\n\n",
            "over lines": "\n".join(json.dumps(row, indent=2) for row in rows), "without breaks": "".join(lines),
            "array": json.dumps(rows), "array of lines": "[\n" + ",\n".join(lines) + "\n]\n",
            "array over lines": json.dumps(rows, indent=1, ensure_ascii=False),
            "comma first": "[" + "\n ,".join(lines) + " ] \n",
            "lines, then over lines": "\n".join([*lines[:30], *(json.dumps(row, indent=2) for row in rows[30:])])}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("size", [64, 700, 2**20])
@pytest.mark.parametrize("layout", layouts(ROWS[:1]))
def test_any_layout_is_read_at_any_size_and_from_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str,
                                                           size: int, mark: bytes) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", size)
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + layouts(ROWS)[layout].encode())
    rows = list(shard(path).rows())
    assert [row[:2] for row in rows] == [(i, row["text"]) for i, row in enumerate(ROWS) if row["text"].strip()]
    for n in range(0, len(rows), 11):
        assert list(shard(path).rows(rows[n].number, at=rows[n].at)) == rows[n:]
    if size == 700 and layout != "without breaks":
        assert len({row.at[0] for row in rows}) > 3  # streamed


def test_the_places_of_lines_are_where_blocks_always_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", 700)
    path = tmp_path / "a.jsonl"
    path.write_text(layouts(ROWS)["blank lines"])
    expected, offset, first = [], 0, 0
    stream = io.BytesIO(path.read_bytes())
    while block := stream.read(700):
        block += b"" if block.endswith(b"\n") else stream.readline()
        expected.append([offset, first])
        offset, first = offset + len(block), first + sum(bool(line.strip()) for line in block.split(b"\n"))
    found = [row.at for row in shard(path).rows()]
    assert [at for i, at in enumerate(found) if at not in found[:i]] == expected


@pytest.mark.parametrize("layout", ["lines", "array over lines"])
def test_conversations_arrive_as_they_are_written(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [{"role": "user", "content": "2021-03-01"}, {"role": "assistant", "content": "call", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": arguments}}]}]} for arguments in TOOLS]
    path = tmp_path / "a.jsonl"
    path.write_text(layouts(rows)[layout])
    assert [json.loads(text) for text in texts_of(path, messages="messages")] == [row["messages"] for row in rows]
    assert texts_of(path, messages="messages")[3].count(str(2**70)) == 1


def test_what_a_block_begins_with_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words first and dates later, numbers in a column nobody asked for, a column that later rows alone have."""
    monkeypatch.setattr(file_tables, "CHUNK", 200)
    rows = [{"text": "words " * 5 if i < 20 else f"20{i}-03-20", "other": i if i % 2 else {"a": [i]},
             **({"late": i} if i > 30 else {})} for i in range(20, 60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert texts_of(path) == [row["text"] for row in rows]
    assert texts_of(path, filters=parse_filters("data.filters", {"late": ">=50"})) == [row["text"] for row in rows[30:]]
    path.write_text("\n".join(json.dumps({"note": "none"} if i < 20 else {"text": f"text {i}"}) for i in range(40)))
    assert texts_of(path) == [f"text {i}" for i in range(20, 40)]


def test_what_nobody_asked_for_may_be_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "x": NaN}\n{"x": "\\ud83d", "text": "b"}\n{"text": "c", "x": 1e999}\n'
                     b'{"text": "d", "x": "\xe9"}\n')
    assert texts_of(path) == ["a", "b", "c", "d"]


GOOD = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(("content", "words"), [
    (GOOD + b'"just a string"\n', ['row 2 holds "just a string", not an object']), (GOOD + b"null\n", ["row 2 holds null"]),
    (GOOD + b"[1, 2]\n", ["row 2 holds a list"]), (b'["a"]', ['row 0 holds "a"']), (b'[{"text": "a"}, 3]', ["row 1 holds 3"]),
    (GOOD + b'{"text": "c"', ["row 2 is cut short"]), (GOOD + b'{"text": "c\n', ["row 2 is"]),
    (b'[{"text": "a"}, {"text": "b"}', ["row 2 ", "cut short"]), (b'[{"text": "a"}, {"te', ["row 1 is cut short"]),
    (b'[{"text": "a"}] {"text": "b"}', ["row 1 stands after the end of the array"]),
    (b'[{"text": "a"} {"text": "b"}]', ["row 1 is no JSON", "',' delimiter"]), (b'[{"text": "a"},]', ["row 1 is no JSON"]),
    (GOOD + b'{"text": "c"} and more\n', ["row 3 is"]), (GOOD + b'{"text": c}\n' + GOOD, ["row 2 is no JSON", "at \"c}"]),
    (GOOD + b'{"text": "c"},\n{"text": "d"}\n', ["row 3 is no JSON"]), (GOOD + b"{'text': 'c'}\n" + GOOD, ["row 2 is no JSON"]),
    (GOOD + b'{"text": "\\ud83d"}\n', ["row 2 holds", "\\ud83d", "surrogate", "'text'"]),
    (GOOD + b'{"text": "caf\xe9"}\n', ["row 2 holds bytes that are no UTF-8, in 'text'"]),
    (GOOD + b'{"text": "a\x00b"}\n' + GOOD, ["row 2 is no JSON", "control character"]),
    (GOOD + b'{"text": "a", "text": "b"}\n', ["row 2 ", "the key 'text' twice"]),
    (b'{"text": ' + b"[" * 100_000 + b"\n", ["row 0 is nested deeper than the 200"]),
    (b'{"text": "a", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}\n", ["row 0 is nested deeper than the 200"]),
    (b"[" * 100_000, ["row 0 is nested deeper than the 200"]),
    (GOOD + b'{"text": 3}\n', ["data.column=text: row 2 of a.jsonl holds 3, not text; the columns are text"]),
    (GOOD + b'{"text": true}\n', ["row 2 of a.jsonl holds true, not text"]),
    (GOOD + b'{"text": ["a"]}\n', ["row 2 of a.jsonl holds a list, not text"]),
    (b'{"txt": "a"}\n' * 5 + b'{"teks": "a"}\n', ["data.column=text: a.jsonl", "the columns txt, teks (did you mean 'txt'?)"]),
])
@pytest.mark.parametrize("size", [20, 2**20])
def test_what_is_wrong_is_one_line_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, content: bytes,
                                                words: list[str]) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", size)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts_of(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("row", "spec", "words"), [
    ({"q": True, "a": "x"}, {"prompt": "q", "answer": "a"}, ["data.prompt_column=q: row 12 of a.jsonl holds true, not text"]),
    ({"q": "x", "a": 7}, {"prompt": "q", "answer": "a"}, ["data.answer_column=a: row 12 of a.jsonl holds 7, not text"]),
    ({"m": "hi"}, {"messages": "m"}, ["data.messages_column=m: row 12 of a.jsonl holds \"hi\", not a list of messages"]),
    ({"m": [{"role": "assistant", "content": "x", "a": eval("[" * 190 + "]" * 190)}]}, {"messages": "m"}, []),
    ({"m": [{"role": "assistant", "content": "x", "a": json.loads("[" * 300 + "]" * 300)}]}, {"messages": "m"},
     ["row 12 of a.jsonl is nested deeper than the 200"]),
    ({"q": "x", "b": "y"}, {"prompt": "q", "answer": "c"}, ["row 12 of a.jsonl has an empty answer"]),
])
def test_rows_are_counted_from_the_start_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict, spec: dict,
                                                     words: list[str]) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", 150)
    right = {"q": "question", "a": "answer", "c": "answer", "m": [{"role": "assistant", "content": "yes"}]}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [*[right] * 12, row])))
    place = None
    for start in (0, 9):  # from the start, and taken up again
        read = shard(path, **spec)
        try:
            assert len(list(read.rows(start, at=place))) == 13 - start - bool(words)
            said = str(read.spec.left_out.first or "")  # a conversation that cannot be learnt from is left out
        except UserError as error:
            said = str(error)
        assert bool(said) == bool(words) and all(word in said for word in words), said
        place = next(row for row in shard(path, **spec).rows() if row.number == 9).at
        assert place[0] > 0


def test_a_wrong_answer_column_is_said_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "x", "reply": "y"}\n')
    with pytest.raises(UserError, match="data.answer_column=replies: a.jsonl .*did you mean 'reply'"):
        texts_of(tmp_path / "a.jsonl", prompt="q", answer="replies")


@pytest.mark.parametrize(("filters", "keeps"), [
    ({"day": ">=2024-03-01"}, [1, 2, 3, 4]), ({"day": "2024-03-01"}, [1]), ({"day": "<2024-03-01T10:00"}, [0, 1, 3]),
    ({"day": [">=none"]}, []), ({"day": ["2024-03-02", "2024-02-29"]}, [0]), ({"n": 5}, [0, 1]), ({"n": "!=5"}, [2, 3, 4]),
    ({"big": ">=1.5e21"}, [4]), ({"big": "<3"}, [0, 1, 2]),
])
def test_filters_compare_each_value_as_what_it_is(tmp_path: Path, filters: dict, keeps: list[int]) -> None:
    """Dates are text in JSON, in any of the spellings of ISO 8601; a column may hold numbers and text."""
    days = ["2024-02-29", "2024-03-01", "2024-03-01 12:00", "2024-03-01T11:00:00.5+02:00", "2024-03-01T12:00:00Z"]
    numbers, bigs = [5, "5", 6, "six", 5.5], [1, 2.5, -(2**66), 2**69, 2**71]
    rows = [{"text": str(i), "day": days[i], "n": numbers[i], "big": bigs[i]} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"text": "none"}')
    assert texts_of(tmp_path / "a.jsonl", filters=parse_filters("data.filters", filters)) == list(map(str, keeps))


def test_a_row_that_is_left_out_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"text": "a", "kind": "text"}, {"text": 3, "kind": "number"}, {"text": "b", "kind": "text"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts_of(tmp_path / "a.jsonl", filters=parse_filters("data.filters", {"kind": "text"})) == ["a", "b"]


@pytest.mark.parametrize(("value", "words"), [("six", "row 1 of a.jsonl holds text"), ([1], "row 1 of a.jsonl holds a list"),
                                             (True, "row 1 of a.jsonl holds true or false")])
def test_a_filter_names_the_row_that_it_cannot_compare(tmp_path: Path, value: Any, words: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "a", "n": n}) for n in (1, value, 2)))
    with pytest.raises(UserError, match=f"data.filters.n=3: cannot be compared with the column, which in {words}"):
        texts_of(tmp_path / "a.jsonl", filters=parse_filters("data.filters", {"n": ">=3"}))


def test_a_column_that_does_not_come_early_in_a_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", 100)
    monkeypatch.setattr(file_tables, "AHEAD", 1000)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n' * 100 + "damage that is never reached")
    with pytest.raises(UserError, match="data.column=text: a.jsonl .*has the columns body"):
        sources.open_source(Spec("data.source", str(tmp_path / "a.jsonl")), fraction=0.0, window=8, seed=1, lanes=1)


def test_answers_that_are_dates_are_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"When was {i}?", "answer": f"2021-03-{i:02}"} for i in range(1, 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [json.loads(text) for text in texts_of(tmp_path / "a.jsonl", prompt="prompt", answer="answer")]
    assert [[message["content"] for message in messages] for messages in found] == [list(row.values()) for row in rows]
