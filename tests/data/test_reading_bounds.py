"""Files that are small on the disk and large when read, and files that change under a run: one line, and little memory."""

from __future__ import annotations

import gzip
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from genscale.data import source_file
from genscale.data.readers import Spec, TableShard
from genscale.data.source_file import SourceFile
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.settings import readings, validation_reading
from genscale.errors import UserError

MEGABYTE = 2**20


def shard(path: Path, **spec: Any) -> TableShard:
    return TableShard(path.name, path.stat().st_size, Spec("data.source", str(path), max_record_bytes=2 * MEGABYTE, **spec),
                      SourceFile.local(path, f"data.source={path}"))


def read(path: Path, **spec: Any) -> list[str]:
    return [row.document for row in shard(path, **spec).rows()]


LONG = b"a " * MEGABYTE + b"a"
JUST = b"a" * (2 * MEGABYTE - 12)


@pytest.mark.parametrize(("name", "content", "spec", "words"), [
    ("a.jsonl", b'{"text": "x"}\n{"text": "' + LONG + b'"}\n', {}, "the line of row 1 has"),
    ("a.jsonl", b'{"text":\n "x"}\n{"text":\n"' + LONG + b'"}\n', {}, "the line of row "),
    ("a.jsonl", b'{"text":\n["' + b'x",\n"' * MEGABYTE + b'"]}\n', {}, "row 0 has"),
    ("a.jsonl", b'[{"text": "x"}, {"text": "' + LONG + b'"}]', {}, "row 1 has"),
    ("a.txt", b"x\n" + LONG, {"document": "line"}, "the line of row 1 has"),
    ("a.txt", b"x\n\n" + LONG.replace(b" ", b"\n"), {}, "row 1 has"),
    ("a.txt", LONG, {"document": "file"}, "it is held in memory as a whole, and has"),
    ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * MEGABYTE), {}, "it decompresses to over 200 times its size,"),
    ("a.txt.gz", gzip.compress(b"x\n\n" * MEGABYTE), {}, "it decompresses to over 200 times its size,"),
    ("a.parquet.zst", zstandard.compress(os.urandom(MEGABYTE) * 3), {}, "it is held in memory as a whole, and has"),
])
def test_what_grows_beyond_the_bound_is_refused_by_name(tmp_path: Path, name: str, content: bytes, spec: dict,
                                                        words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {words}.* more than 2 MiB; .*data.max_record_bytes") as caught:
        read(tmp_path / name, **spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content", "spec"), [
    ("a.jsonl", b'{"text": "' + JUST + b'"}\n{"text": "x"}', {}),
    ("a.jsonl", b'[{"text": "' + JUST + b'"}, {"text": "x"}]', {}),
    ("a.txt", JUST + b"\n" + b"x\n", {"document": "line"}), ("a.txt", JUST + b"\n\nx", {}),
])
def test_what_is_as_large_as_allowed_is_read(tmp_path: Path, name: str, content: bytes, spec: dict) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, **spec)[:2] == [JUST.decode(), "x"]


def test_the_bound_is_a_setting_of_all_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(LONG)
    with pytest.raises(UserError, match="more than 1 MiB; .*data.max_record_bytes"):
        TextData(TextDataSettings(source=str(tmp_path / "a.txt"), max_record_bytes=2**20, document="line"), seed=1)
    settings = TextDataSettings(sources=[{"source": "python-docs"}], validation_source="python-docs",
                                max_record_bytes=7 * MEGABYTE)
    assert readings(settings)[0].spec.max_record_bytes == validation_reading(settings).max_record_bytes == 7 * MEGABYTE


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_dictionary_of_one_huge_text_is_read_a_row_at_a_time(tmp_path: Path, compression: str) -> None:
    """A file of 1 kB in which each of 64 rows stands for 1.5 MB: at once they would be 96 MB, and of 50 MB each 3 GB."""
    text = "x" * (3 * MEGABYTE // 2)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", dictionary_pagesize_limit=2**30, store_schema=False,
                   compression=compression)
    before = pa.total_allocated_bytes()
    rows = shard(tmp_path / "a.parquet").rows()
    assert next(rows).document == text and pa.total_allocated_bytes() - before < 8 * MEGABYTE
    assert len(list(rows)) == 63
    pq.write_table(pa.table({"text": [text * 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: row 0 has more than 2 MiB; .*data.max_record_bytes"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "spec"), [("a.jsonl.zst", {}), ("a.txt.zst", {"document": "line"}), ("a.txt.zst", {}),
                                            ("a.txt.zst", {"document": "file"}), ("a.parquet.zst", {})])
def test_a_bomb_takes_little_memory(tmp_path: Path, name: str, spec: dict) -> None:
    (tmp_path / name).write_bytes(zstandard.compress(b'{"text": "' + b"a" * 100 * MEGABYTE))
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 2 MiB; .*data.max_record_bytes"):
        read(tmp_path / name, **spec)
    assert tracemalloc.get_traced_memory()[1] < 16 * MEGABYTE
    tracemalloc.stop()


def test_a_window_that_zstd_does_not_open_is_said_as_that(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(b'{"text": "x"}\n') + stream.flush())
    with pytest.raises(UserError, match="a.jsonl.zst: its zstd window is larger than the 128 MiB .*--long=27"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("size", [100, 2**17])
def test_a_file_rewritten_under_its_former_time_is_noticed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * size)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    file = SourceFile.local(path, "data.source=a.txt")
    path.write_text("b" * size)
    os.utime(path, ns=times)
    with pytest.raises(UserError, match="data.source=a.txt: .*a.txt has changed since .* .another content"), file.open():
        pass


def test_a_file_that_is_only_touched_is_read_on(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_file, "_warned", set())
    for size, warnings in ((100, 0), (2**17, 1)):
        path = tmp_path / f"{size}.txt"
        path.write_text("a" * size)
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        file = SourceFile.local(path, f"data.source={path}")
        path.chmod(0o640)
        os.link(path, tmp_path / f"{size}.link")
        path.unlink()
        path.write_text("a" * size)  # copied back with its time
        os.utime(path, ns=times)
        with caplog.at_level(logging.WARNING, logger="genscale"):
            caplog.clear()
            for _ in range(2):
                with file.open(3) as stream:
                    assert stream.read() == b"a" * (size - 3)
        assert len(caplog.records) == warnings  # a small file was compared as a whole
