"""The order of documents: exactly once an epoch, a pure function of (seed, epoch, lane), and resumable anywhere."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from genscale.data import memory_source
from genscale.data.packing import PIECE, Piece, cut
from genscale.data.readers import Spec
from genscale.data.text import sources
from genscale.data.text.sources import Source, open_source
from genscale.errors import UserError

DOCUMENTS = [f"doc {i} " + "é東 x"[i % 4] * (i * 37 % 211) + ("\nline two" if i % 3 else "") for i in range(101)]


def write_jsonl(path: Path, texts: list[str], opener: Callable[..., Any] = open) -> None:
    with opener(path, "wb") as file:
        file.write("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode())


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)


def folder(path: Path, files: int) -> Path:
    """DOCUMENTS over some .jsonl files, a few of them compressed, in two folders."""
    (path / "more").mkdir()
    for i in range(files):
        opener, suffix = [(open, ""), (gzip.open, ".gz"), (lzma.open, ".xz"), (bz2.open, ".bz2")][i % 4]
        name = f"{i}.jsonl{suffix}" if suffix else f"[{i}]*.jsonl"  # no pattern, although it looks like one
        write_jsonl((path / "more" if i % 2 else path) / name, DOCUMENTS[i::files], opener)
    return path


def source_of(path: Path | str, *, lanes: int = 4, seed: int = 1, fraction: float = 0.0, **spec: str) -> Source:
    return open_source(Spec("data.source", str(path), **spec), fraction=fraction, window=8, seed=seed, lanes=lanes)


def epoch_of(source: Source, lane: int, epoch: int) -> list[Piece]:
    pieces = []
    for piece in source.read(lane):
        if piece.place["epoch"] > epoch:
            return pieces
        if piece.place["epoch"] == epoch:
            pieces.append(piece)
    raise AssertionError


def epoch_documents(source: Source, lanes: int, epoch: int) -> list[str]:
    """The documents of an epoch, put together again across the cuts between lanes."""
    texts, text = [], ""
    for lane in range(lanes):
        for piece in epoch_of(source, lane, epoch):
            text += piece.text
            if piece.ends:
                texts.append(text)
                text = ""
    assert text == ""
    return texts


@pytest.fixture(params=["memory", "stream"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stream":
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    return request.param


@pytest.mark.parametrize(("files", "lanes"), [(1, 1), (1, 4), (3, 6), (7, 3), (6, 3), (5, 8)])
def test_every_document_exactly_once_an_epoch(tmp_path: Path, kind: str, files: int, lanes: int) -> None:
    source = source_of(folder(tmp_path, files), lanes=lanes)
    assert source.plan()["order"] == kind
    orders = [epoch_documents(source, lanes, epoch) for epoch in range(3)]
    for order in orders:
        assert Counter(order) == Counter(DOCUMENTS)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != epoch_documents(source_of(tmp_path, lanes=lanes, seed=2), lanes, 0)
    assert orders[0] == epoch_documents(source_of(tmp_path, lanes=lanes), lanes, 0)


def test_lanes_of_a_source_in_memory_are_equally_long() -> None:
    source = source_of("python-docs", lanes=48)
    sizes = [sum(len(piece.text.encode()) for piece in epoch_of(source, lane, 0)) for lane in range(48)]
    assert max(sizes) - min(sizes) <= 4  # a document of 62 kB and one of 200 bytes among them


def test_row_groups_make_shards_where_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    source = source_of(tmp_path / "a.parquet", lanes=5)
    assert source.plan()["shards"] == 15  # 101 rows in groups of 7
    assert Counter(epoch_documents(source, 5, 0)) == Counter(DOCUMENTS)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_training_and_validation_never_overlap(tmp_path: Path, kind: str, fraction: float) -> None:
    texts = DOCUMENTS + DOCUMENTS[:20]  # duplicates must fall on one side
    write_jsonl(tmp_path / "a.jsonl", texts)
    held = [set(source_of(tmp_path, lanes=lanes, seed=seed, fraction=fraction).held_out())
            for lanes, seed in [(1, 1), (3, 2), (4, 1)]]
    assert held[0] == held[1] == held[2] and held[0]
    source = source_of(tmp_path, lanes=3, fraction=fraction)
    trained = set(epoch_documents(source, 3, 0))
    assert trained == set(source.documents())
    assert trained.isdisjoint(held[0]) and trained | held[0] == set(texts)
    assert abs(len(held[0]) / len(DOCUMENTS) - fraction) < 0.15


def test_every_place_continues_exactly(tmp_path: Path, kind: str) -> None:
    long = ["long " * 8000, *DOCUMENTS]  # a document of several pieces
    write_jsonl(tmp_path / "a.jsonl", long)
    source = source_of(tmp_path, lanes=2, fraction=0.1)
    pieces = list(islice(source.read(1), 150))
    assert pieces[-1].place["epoch"] >= 2
    for i in range(0, 120, 7):
        again = json.loads(json.dumps(pieces[i].place))
        assert list(islice(source.read(1, again), 30)) == pieces[i : i + 30]


@pytest.mark.parametrize(("document", "expected"), [
    ("line", ["one", "two", "three é", "four"]), ("paragraph", ["one\ntwo", "three é", "four\n"]),
    ("file", ["one\ntwo\n\nthree é\n\n\n\nfour\n"]),
])
@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open),
                                                (".zst", zstandard.open)])
def test_text_files(tmp_path: Path, document: str, expected: list[str], suffix: str, opener: Callable[..., Any]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wb") as file:
        file.write("one\ntwo\n\nthree é\n\n\n\nfour\n".encode())
    assert list(source_of(path, lanes=1, document=document).documents()) == expected


def test_folders_are_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "1.jsonl", ["second"])
    write_parquet(tmp_path / "c.parquet", ["third"])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.md").write_text("not read")
    assert list(source_of(tmp_path, lanes=1).documents()) == ["first", "second", "third"]


def damaged_parquet(path: Path) -> Path:
    (path / "a.parquet").write_bytes(b"PAR1 and then nothing that is parquet")
    return path


def one_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name
    return make


@pytest.mark.parametrize(("make", "spec", "words"), [
    (lambda path: path / "corpus.txt", {}, ["data.source=", "no such file"]),
    (lambda path: path / "folder", {}, ["data.source=", "no such file or folder"]),
    (lambda path: path, {}, ["data.source=", "holds no file", ".jsonl"]),
    (one_file("a.csv", b"a,b\n"), {}, ["data.source=", "not read", ".parquet"]),
    (one_file("a.txt", b""), {}, ["data.source=", "no text"]),
    (one_file("a.txt", b"\n\n \n"), {}, ["data.source=", "no text"]),
    (one_file("a.jsonl", b'{"txt": "hello"}\n'), {}, ["data.column=text", "has the columns txt", "did you mean 'txt'"]),
    (one_file("a.jsonl", b'{"text": 3}\n'), {}, ["data.column=text: row 0 of a.jsonl holds 3, not text"]),
    (one_file("a.txt", b"hello"), {"column": "body"}, ["data.column=body", "has the columns text"]),
    (one_file("a.jsonl", b'{"text": "a"}\n{"text": "b\n{"te'), {}, ["data.source=", "a.jsonl is damaged", "row 1 is"]),
    (one_file("a.txt", b"\xff\xfe caf\xe9"), {}, ["data.source=", "a.txt is damaged", "utf-8"]),
    (one_file("a.txt.gz", b"\x1f\x8b not gzip"), {}, ["data.source=", "a.txt.gz is damaged"]),
    (one_file("a.txt.gz", gzip.compress(b"x" * 100000)[:50]), {}, ["data.source=", "a.txt.gz is damaged"]),
    (one_file("a.txt.zst", zstandard.compress(b"x" * 100000)[:10]), {}, ["data.source=", "a.txt.zst is damaged", "Truncated"]),
    (one_file("a.jsonl.gz", gzip.compress(b"")), {}, ["data.source=", "no text"]),
    (damaged_parquet, {}, ["data.source=", "a.parquet is damaged"]),
])
def test_bad_sources_are_one_clear_line(tmp_path: Path, kind: str, make: Callable[[Path], Path], spec: dict[str, str],
                                        words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        source_of(make(tmp_path), **spec)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="data.source=someone/something: .*HF_HUB_OFFLINE.*local file or folder"):
        source_of("someone/something")


def test_unknown_column_of_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["hello"])
    with pytest.raises(UserError, match="data.column=test.*id, text.*did you mean 'text'"):
        source_of(tmp_path, column="test")


def test_too_little_text_for_the_lanes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only twenty-two bytes.")
    with pytest.raises(UserError, match="data.lanes=48: .*22 bytes.*data.lanes to 5 at most"):
        source_of(tmp_path, lanes=48)


def test_a_lane_without_a_document_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    write_jsonl(tmp_path / "a.jsonl", ["only one", "or two"])
    with pytest.raises(UserError, match="data.lanes=4"):
        [next(source_of(tmp_path, lanes=4).read(lane)) for lane in range(4)]


def test_a_single_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document only " * 50)
    with pytest.raises(UserError, match="data.validation_source"):
        source_of(tmp_path, fraction=0.05)


def test_large_lanes_begin_at_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is whole (a cache can hold it), and comes once an epoch."""
    monkeypatch.setattr(memory_source, "PIECES_OF_A_LANE", 1)
    texts = [f"{i} " + "some é words " * (7000 * (i % 5 == 0) + i) for i in range(12)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    source = source_of(tmp_path, lanes=3)
    found = Counter()
    for lane in range(3):
        window = next(source.windows(lane))
        for document in range(len(window.rows)):
            for stretch in window.stretches(document):
                assert stretch.whole
                found[int(window.rows[document]), stretch.number, stretch.text] += 1
    expected = Counter((row, number, piece) for row, text in enumerate(texts) for number, piece in enumerate(cut(text)))
    assert found == expected
    lengths = [sum(len(piece.text) for piece in epoch_of(source, lane, 0)) for lane in range(3)]
    assert max(lengths) - min(lengths) < 3 * PIECE


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_parts_of_a_sweep_are_the_training_documents(tmp_path: Path, kind: str, processes: int) -> None:
    source = source_of(folder(tmp_path, 2), lanes=3, fraction=0.2)
    swept = Counter()
    for part, _ in source.parts(processes):
        for window in source.sweep(part):
            swept.update(window.text(document) for document in range(len(window.rows)))
    assert swept == Counter(source.documents())
