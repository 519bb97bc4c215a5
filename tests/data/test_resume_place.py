"""Taking a large source up again: what is fetched does not grow with what was consumed, and the samples are the same."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data import file_tables, web
from genscale.data.images import sources as image_sources
from genscale.data.images.shards import ImageSpec
from genscale.data.spec import Spec
from genscale.data.text import sources
from genscale.data.windows import Source

BLOCK, WINDOW = 2048, 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(file_tables, "CHUNK", BLOCK)
    monkeypatch.setattr(web, "BLOCK", BLOCK)
    texts = [f"{i} " + random.Random(i).randbytes(200).hex() for i in range(240)]
    ends = ["\n", "\r\n", "\n\n\n", "\r\n\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" * (1 + i % 2) for i, text in enumerate(texts)))
    (tmp_path / "lines.txt").write_bytes("".join(text + ends[i % 2] for i, text in enumerate(texts)).encode())
    (tmp_path / "paragraphs.txt").write_bytes("".join(text + "\n" + ends[i % 4] for i, text in enumerate(texts)).encode())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=8, compression="none",
                   use_dictionary=False)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for i, text in enumerate(texts):
            for name, content in ((f"{i}.cls", b"1"), (f"{i}{'x' * 120 * (i % 3 == 0)}.png", text.encode()[:50])):
                member = tarfile.TarInfo(name)  # names of over 100 characters have a member of their own before them
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp_path


def source_of(url: str) -> Source:
    if url.endswith(".tar"):
        spec = ImageSpec("data.source", url)
        return image_sources._stream(image_sources.find_shards(spec)[0], spec, image_sources.Order(0.0, WINDOW, 1, 1))
    document = "line" if "lines" in url else "paragraph"
    return sources.open_source(Spec("data.source", url, document=document), fraction=0.0, window=WINDOW, seed=1, lanes=1)


def windows(source: Source, place: dict | None = None) -> Iterator[tuple[dict, list]]:
    for window in source.windows(0, json.loads(json.dumps(place))):
        if len(window.rows):  # else only the news that a part was read to its end
            documents = [window.text(n) for n in range(len(window.rows))]
            yield window.place(0, 0), [getattr(document, "content", document) for document in documents]


@pytest.mark.parametrize("name", ["a.jsonl", "lines.txt", "paragraphs.txt", "a.parquet", "a.tar"])
def test_no_more_than_a_window_is_read_again(folder: Path, serve, name: str) -> None:
    url, asked = serve(folder)
    whole = list(islice(windows(source_of(str(folder / name))), 40))
    assert whole[29][0]["epoch"] == 0 and whole[30][0]["epoch"] == 1  # 240 documents in windows of 8
    source = source_of(f"{url}/{name}")
    size = (folder / name).stat().st_size
    for number in (3, 15, 28):
        place, _ = whole[number]
        asked.clear()
        assert next(windows(source, place)) == whole[number]
        fetched = sum(count for _, _, count in asked)
        footer = 65536 if name == "a.parquet" else 0  # Arrow reads as many bytes of a file's end
        assert fetched < 12 * BLOCK + footer < size * (0.7 if footer else 0.3), (number, fetched, size)
    place = None
    for first in (0, 11, 22):  # resumed again and again, also into the next epoch
        legs = list(islice(windows(source_of(str(folder / name)), place), 12))
        assert legs == whole[first : first + 12]
        place = legs[-1][0]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz"])
def test_compressed_files_are_the_same_from_any_place(folder: Path, suffix: str) -> None:
    import gzip
    import lzma

    import zstandard

    compress = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}[suffix]
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(compress((folder / "a.jsonl").read_bytes()))
    whole = list(islice(windows(source_of(str(path))), 36))
    assert [texts for _, texts in whole] == [texts for _, texts in islice(windows(source_of(str(folder / "a.jsonl"))), 36)]
    for number in (1, 20, 33):
        assert next(windows(source_of(str(path)), whole[number][0])) == whole[number]


def test_a_block_is_the_same_wherever_reading_begins(folder: Path) -> None:
    """A column that is missing, or of another type, in later blocks is as the first block has it."""
    rows = [{"text": f"{i} " * 20, "score": i if i < 300 else i + 0.0} | ({"kind": "x"} if i < 100 else {}) for i in range(600)]
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    from genscale.data.spec import parse_filters

    spec = Spec("data.source", str(path), filters=parse_filters("data.filters", {"score": ">=7"}))
    source = sources.open_source(spec, fraction=0.0, window=WINDOW, seed=1, lanes=1)
    whole = list(islice(windows(source), 80))
    assert sorted(text for place, texts in whole if not place["epoch"] for text in texts) == sorted(
        row["text"] for row in rows[7:])
    for number in (2, 40, 70):
        assert next(windows(source, whole[number][0])) == whole[number]
