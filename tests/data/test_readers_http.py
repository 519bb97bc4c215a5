"""Files read over HTTP against the same files on the disk; servers that do not answer."""

from __future__ import annotations

import gzip
import http.server
import json
import random
import socket
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from genscale.data import file_tables
from genscale.data.spec import Spec
from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.sources import open_source
from genscale.errors import UserError

TEXTS = [f"document {i} " + "é東 x"[i % 4] * (i * 37 % 211) for i in range(301)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), tmp_path / "a.parquet", row_group_size=50)
    return tmp_path


def source_of(*locations: str, lanes: int = 4, document: str = "line") -> sources.Source:
    spec = Spec("data.source", locations[0], document=document, locations=locations if len(locations) > 1 else ())
    return open_source(spec, fraction=0.0, window=16, seed=1, lanes=lanes)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_a_url_is_read_like_the_file(folder: Path, serve, name: str, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = serve(folder, ranges)
    if not ranges and name in ("a.jsonl", "a.parquet"):
        with pytest.raises(UserError, match=f"data.source={url}/{name}: .*parts of a file.*compressed"):
            source_of(f"{url}/{name}")
        return
    for limit in (sources.MEMORY_LIMIT, 0):
        monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
        there, here = source_of(f"{url}/{name}?token=1"), source_of(str(folder / name))
        assert there.plan()["order"] == here.plan()["order"] and there.plan()["bytes"] == here.plan()["bytes"]
        assert list(there.documents()) == list(here.documents()) == TEXTS
        if not limit and name != "a.parquet":  # the same shards, dealt alike
            assert list(islice(there.read(2), 200)) == list(islice(here.read(2), 200))


@pytest.mark.parametrize("document", ["paragraph", "file"])
def test_text_documents_of_a_url(tmp_path: Path, serve, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tables, "CHUNK", 7)  # so that chunks end everywhere in and between paragraphs
    text = "one\ntwo\n\nthree é\n\n\n\nfour\n\n\nfive"
    expected = [text] if document == "file" else [paragraph for paragraph in text.split("\n\n") if paragraph]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "dos.txt").write_bytes(text.replace("\n", "\r\n").encode())
    url, _ = serve(tmp_path)
    for location in (str(tmp_path / "a.txt"), f"{url}/a.txt", str(tmp_path / "dos.txt")):
        assert list(source_of(location, lanes=1, document=document).documents()) == expected


class Endless(http.server.BaseHTTPRequestHandler):
    """Says no size: the end of the file is that of the connection, as with HTTP/1.0, or is marked by the last chunk."""

    def __init__(self, *arguments: object, directory: str) -> None:
        self.folder = Path(directory)
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        if self.ranges == "chunked":
            self.protocol_version = "HTTP/1.1"
            content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
        self.close_connection = True
        self.send_response(200)
        if self.ranges == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(content)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zst", "a.jsonl.gz"])
def test_a_file_that_would_look_whole_when_cut_off_is_refused(folder: Path, serve, name: str) -> None:
    url, _ = serve(folder, "chunked", Endless)
    assert list(source_of(f"{url}/{name}").documents()) == TEXTS
    url, _ = serve(folder, "closed", Endless)
    if not name.endswith(".txt"):
        assert list(source_of(f"{url}/{name}").documents()) == TEXTS
        (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            source_of(f"{url}/{name}")
        return
    with pytest.raises(UserError, match=f"data.source={url}/{name}: cannot be read .the server does not say how long it is"):
        source_of(f"{url}/{name}")


def test_several_urls_and_files_are_one_source(folder: Path, serve) -> None:
    url, _ = serve(folder)
    (folder / "b.txt").write_text("one more\nand another")
    assert list(source_of(f"{url}/a.jsonl.zst", f"{url}/b.txt").documents()) == [*TEXTS, "one more", "and another"]
    assert list(source_of(str(folder / "b.txt"), f"{url}/a.jsonl").documents()) == ["one more", "and another", *TEXTS]


def test_a_large_file_is_streamed_and_fetched_once(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 2**20)
    text = "words and words " * 2000
    with open(tmp_path / "large.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(500))
    url, asked = serve(tmp_path)
    size = (tmp_path / "large.jsonl").stat().st_size
    source = source_of(f"{url}/large.jsonl", lanes=1)

    def fetched() -> int:
        return sum(count for _, wanted, count in asked if wanted and wanted != "bytes=0-0")
    asked.clear()
    assert next(source.read(0)).text and size > 15_000_000
    assert fetched() < size * 0.75
    asked.clear()
    assert len(list(source.documents())) == 500
    assert fetched() < size + 3 * 2**21  # the beginning is looked at once more, for the columns


@pytest.mark.parametrize("ranges", [True, False])
def test_compressed_files_larger_than_a_block(tmp_path: Path, serve, ranges: bool) -> None:
    texts = [f"{i} {random.Random(i).randbytes(30_000).hex()}" for i in range(200)]  # 6 MB when compressed
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode(), 1))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    url, _ = serve(tmp_path, ranges)
    for name in ("a.jsonl.zst", "a.txt.gz", "a.txt"):
        assert list(source_of(f"{url}/{name}").documents()) == texts


def test_training_data_from_a_url(folder: Path, serve) -> None:
    url, _ = serve(folder)
    settings = {"lanes": 4, "sequence_length": 32}
    there = TextData(TextDataSettings(source=f"{url}/a.jsonl.zst", **settings), seed=1)
    here = TextData(TextDataSettings(source=str(folder / "a.jsonl"), **settings), seed=1)
    for lane in range(4):
        for (a, _), (b, _) in islice(zip(there.open_lane(lane), here.open_lane(lane), strict=True), 100):
            assert a["tokens"].tolist() == b["tokens"].tolist()
    assert [s["tokens"].tolist() for s in there.validation()] == [s["tokens"].tolist() for s in here.validation()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("case", "words"), [
    ("missing", ["404", "nothing at this address"]), ("refused", ["refused", "check that the server runs"]),
    ("unknown", ["no-such-host.invalid does not resolve", "check the network"]), ("kind", ["not read", ".jsonl"]),
])
def test_urls_that_cannot_be_read_are_one_line_and_no_long_wait(folder: Path, serve, case: str, words: list[str]) -> None:
    url = {"missing": f"{serve(folder)[0]}/b.jsonl", "refused": f"http://127.0.0.1:{free_port()}/a.jsonl",
           "unknown": "https://no-such-host.invalid/a.jsonl", "kind": f"{serve(folder)[0]}/page.html"}[case]
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        source_of(url)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith(f"data.source={url}: ") and all(word in str(caught.value) for word in words)
    with pytest.raises(UserError, match="data.validation_source=http"):
        TextData(TextDataSettings(validation_source=url, lanes=2), seed=1)


def test_the_url_at_fault_is_named_among_many(folder: Path, serve) -> None:
    url, _ = serve(folder)
    with pytest.raises(UserError, match=f"data.source={url}/c.jsonl: .*404"):
        source_of(f"{url}/a.jsonl", f"{url}/a.txt", f"{url}/c.jsonl")


def test_a_server_that_goes_away_is_named(folder: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    url, _ = serve(folder)
    source = source_of(f"{url}/a.jsonl", lanes=1)
    (folder / "a.jsonl").unlink()
    with pytest.raises(UserError, match=f"data.source={url}/a.jsonl: .*goes on from its last checkpoint"):
        next(source.read(0))


def test_unknown_columns_of_a_parquet_url(folder: Path, serve) -> None:
    url, _ = serve(folder)
    with pytest.raises(UserError, match="data.column=test.*id, text.*did you mean 'text'"):
        open_source(Spec("data.source", f"{url}/a.parquet", column="test"), fraction=0.0, window=16, seed=1, lanes=1)
