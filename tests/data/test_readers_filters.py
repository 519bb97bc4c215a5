"""Rows kept by filters against the same conditions in plain Python; held-out choice; refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data.spec import Spec, parse_filters
from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.sources import Source, open_source
from genscale.errors import UserError

ROWS = [{"text": f"document {i} " * (1 + i % 7), "language": ["en", "de", None][i % 3], "score": None if i % 11 == 0 else i % 6,
         "quality": i / 10, "good": i % 4 == 0, "day": date(2024, 1 + i % 12, 1)} for i in range(200)]


@pytest.fixture(params=["jsonl", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / f"a.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=30)
    else:
        file.write_text("\n".join(json.dumps({**row, "day": row["day"].isoformat()}) for row in ROWS))
    return file


def source_of(path: Path, filters: dict[str, Any], lanes: int = 2, fraction: float = 0.0, **spec: Any) -> Source:
    chosen = Spec("data.source", str(path), filters=parse_filters("data.filters", filters), **spec)
    return open_source(chosen, fraction=fraction, window=8, seed=1, lanes=lanes)


@pytest.mark.parametrize(("filters", "keeps"), [
    ({"language": "en"}, lambda row: row["language"] == "en"),
    ({"language": ["en", "de"]}, lambda row: row["language"] in ("en", "de")),
    ({"language": "!=en"}, lambda row: row["language"] == "de"),
    ({"score": 3}, lambda row: row["score"] == 3),
    ({"score": ">=3"}, lambda row: row["score"] is not None and row["score"] >= 3),
    ({"score": "> 1, <= 4"}, lambda row: row["score"] is not None and 1 < row["score"] <= 4),
    ({"score": [1, 5], "language": "de"}, lambda row: row["score"] in (1, 5) and row["language"] == "de"),
    ({"score": ">2.5"}, lambda row: row["score"] is not None and row["score"] > 2.5),
    ({"quality": "<7"}, lambda row: row["quality"] < 7),
    ({"good": True}, lambda row: row["good"]),
    ({"good": "!=true"}, lambda row: not row["good"]),
    ({"day": ">=2024-10-01"}, lambda row: row["day"] >= date(2024, 10, 1)),
])
def test_filters_keep_what_they_say(path: Path, filters: dict[str, Any], keeps: Callable[[dict], bool]) -> None:
    expected = [row["text"] for row in ROWS if keeps(row)]
    assert list(source_of(path, filters).documents()) == expected
    assert 0 < len(expected) < len(ROWS)


def test_lengths(path: Path) -> None:
    assert list(source_of(path, {}, shortest=40).documents()) == [row["text"] for row in ROWS if len(row["text"]) >= 40]
    found = list(source_of(path, {"language": "en"}, shortest=20, longest=50).documents())
    assert found == [row["text"] for row in ROWS if 20 <= len(row["text"]) <= 50 and row["language"] == "en"]


@pytest.mark.parametrize("limit", [0, 2**28])
def test_an_epoch_of_the_lanes_is_what_is_kept(path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
    source, found = source_of(path, {"language": "en"}, lanes=2), []
    for lane in range(2):
        for piece in source.read(lane):
            if piece.place["epoch"]:
                break
            found.append(piece.text)
    assert sorted("".join(found)) == sorted("".join(row["text"] for row in ROWS if row["language"] == "en"))


def test_what_is_held_out_does_not_depend_on_the_filters(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    everything = set(source_of(path, {}, fraction=0.3).held_out())
    kept = {row["text"] for row in ROWS if row["language"] == "en"}
    assert set(source_of(path, {"language": "en"}, fraction=0.3).held_out()) == everything & kept


@pytest.mark.parametrize(("filters", "words"), [
    ({"langage": "en"}, ["data.filters.langage=langage: ", "language", "did you mean 'language'"]),
    ({"score": "high"}, ["data.filters.score='high': cannot be compared", "holds numbers (int64)"]),
    ({"score": True}, ["data.filters.score=True: ", "holds numbers"]),
    ({"language": ">3"}, ["data.filters.language=3: ", "holds text"]),
    ({"good": "yes"}, ["data.filters.good='yes': ", "holds true or false"]),
    ({"score": ">="}, ["data.filters.score='>=': nothing stands after >="]),
    ({"score": ">=3, =5"}, ["data.filters.score='>=3, =5': '=5' is no comparison", '">=3, <5"']),
    ({"score": []}, ["data.filters.score=[]: is no condition"]),
    ({"score": {"min": 3}}, ["data.filters.score=", "is no condition", '">=3"']),
    ({"language": "fr"}, ["data.source=", "no text in column 'text' that the filters keep"]),
])
def test_bad_filters_are_one_clear_line(path: Path, filters: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TextData(TextDataSettings(source=str(path), filters=filters, lanes=2), seed=1)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_filters_of_text_files_and_impossible_lengths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(UserError, match="data.filters.language=language: a.txt .* has the columns text"):
        source_of(tmp_path / "a.txt", {"language": "en"})
    with pytest.raises(UserError, match="data.max_characters=5: is below data.min_characters=9"):
        TextData(TextDataSettings(source=str(tmp_path / "a.txt"), min_characters=9, max_characters=5), seed=1)


@pytest.mark.parametrize(("values", "wanted"), [
    (pa.array([1, 2], pa.time32("s")), ">=2024-01-01"), (pa.array([1, 2], pa.duration("s")), ">=3 days"),
    (pa.array([1, 2], pa.int64()), f">={10**30}"), (pa.array([1, 2], pa.date32()), "tomorrow"),
])
def test_what_cannot_be_compared_is_one_clear_line(tmp_path: Path, values: pa.Array, wanted: str) -> None:
    pq.write_table(pa.table({"text": ["one", "two"], "at": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data.filters.at=.*: cannot be compared with .* in a.parquet") as caught:
        source_of(tmp_path / "a.parquet", {"at": wanted})
    assert "\n" not in str(caught.value)


def test_filters_stand_in_the_plan(path: Path) -> None:
    settings = {"source": str(path), "lanes": 2}
    plain = TextData(TextDataSettings(**settings), seed=1).plan()
    chosen = TextData(TextDataSettings(**settings, filters={"good": True}), seed=1).plan()
    assert "filters" not in plain and chosen["filters"] == {"good": True}
