"""Sources behind a web server that misbehaves on purpose: the same bytes as from the disk, or one error that names the file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import tarfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from genscale.data import retrying, web
from genscale.data.images import sources as image_sources
from genscale.data.images.shards import ImageSpec
from genscale.data.loader import StepLoader
from genscale.data.locations import find_urls
from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError
from genscale.testing.runs import Run

TEXTS = [f"document {i} " + random.Random(i).randbytes(40).hex() for i in range(600)]
FAULTS = ["503", "reset", "none", "truncated", "429 0", "500", "none", "silent", "503 @1", "truncated", "reset"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines, 1))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=300, compression="none")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(60):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = 1000
            archive.addfile(member, io.BytesIO(random.Random(i).randbytes(1000)))
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retrying, "LONGEST_DELAY", 0.1)
    monkeypatch.setattr(web, "SECONDS", 0.5)
    monkeypatch.setattr(web, "BLOCK", 16384)  # so that a small file is many requests
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)


def opened(url: str, minutes: float = 1.0, **changes: object) -> TextData:
    settings = {"lanes": 2, "sequence_length": 64, "validation_fraction": 0.1, "retry_minutes": minutes, **changes}
    return TextData(TextDataSettings(source=url, **settings), seed=1)


def digest(data: TextData, count: int = 300) -> str:
    found = hashlib.sha256()
    for lane in range(data.lane_count):
        for sample, _ in islice(data.open_lane(lane), count):
            found.update(sample["tokens"].tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("name", "ranges"), [("a.jsonl", True), ("a.jsonl.zst", False), ("a.parquet", True)])
def test_the_data_after_retries_are_the_same_bytes(folder: Path, broken_server, name: str, ranges: bool,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    url, server = broken_server(folder, ranges)
    expected = digest(opened(f"{url}/{name}"))
    retrying.retries.take()
    monkey = opened(f"{url}/{name}")
    faults = [fault for fault in FAULTS if fault != "none" or ranges]
    server.faults = list(faults)
    with caplog.at_level(logging.WARNING, logger="genscale"):
        assert digest(monkey) == expected
    met = [fault for fault in faults if fault != "none"]
    assert [fault for fault in server.met if fault != "none"] == met
    assert retrying.retries.take() == len(met)
    said = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(said) <= 1 + 20 / retrying.LOG_SECONDS and all(f"{url}/{name}" in line for line in said)


def test_images_too(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)

    def contents(source: str) -> list[bytes]:
        spec = ImageSpec("data.source", source, retry_minutes=1.0)
        return [row.document.content for shard in image_sources.find_shards(spec)[0] for row in shard.rows()]
    server.faults = list(FAULTS[:4])
    assert contents(f"{url}/a.tar") == contents(str(folder / "a.tar"))
    assert len(server.met) == 3


@pytest.mark.parametrize("answer", ["503 1", "429 @2"])
def test_retry_after_is_heeded(folder: Path, broken_server, answer: str) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl")
    server.faults = [answer]
    started = time.monotonic()
    next(data.open_lane(0))
    assert time.monotonic() - started >= 0.9  # dates have whole seconds


def test_a_retry_after_beyond_patience_leaves_a_last_try(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl", minutes=0.05)
    server.faults = ["503 300"]
    started = time.monotonic()
    next(data.open_lane(0))
    assert 2.9 <= time.monotonic() - started < 10 and server.met == ["503 300"]
    server.faults = ["503 300"] * 3
    started = time.monotonic()
    with pytest.raises(UserError, match="broke off .the server answers 503 .*; tried for data.retry_minutes=0.05"):
        next(data.open_lane(0))
    assert 2.9 <= time.monotonic() - started < 10 and len(server.met) == 3


@pytest.mark.parametrize("status", [408, 425, 429, 500, 507, 520, 521, 522, 523, 524, 529])
def test_answers_that_pass(folder: Path, broken_server, status: int) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl")
    server.faults = [f"{status}"] * 2
    next(data.open_lane(0))
    assert server.met[:2] == [f"{status}"] * 2


@pytest.mark.parametrize(("status", "words"), [
    (401, "it refuses: an expired signed address, or no right to read it"), (403, "it refuses: an expired signed address"),
    (404, "put the file back"), (501, "put the file back"),
])
def test_answers_that_do_not_pass(folder: Path, broken_server, status: int, words: str) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl")
    server.faults = [f"{status}"] * 2
    with pytest.raises(UserError, match=f"data.source={url}/a.jsonl: .*the server answers {status} .*; {words}.*checkpoint"):
        next(data.open_lane(0))
    assert len(server.met) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_count_reaches_the_trainer(folder: Path, broken_server, workers: int) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl")
    retrying.retries.take()
    server.faults = ["503 0", "reset", "503 0"]
    loader = StepLoader(data, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1, workers=workers, prefetch_steps=1)
    for _ in range(3):
        loader.next_batch()
    loader.close()
    assert loader.retries == 3


@pytest.mark.parametrize("patience", [0.05, pytest.param(1.0, marks=[pytest.mark.slow, pytest.mark.matrix])])
def test_a_server_that_is_gone_is_waited_for(folder: Path, broken_server, patience: float) -> None:
    """3 seconds in the quick tests, 30 in the matrix."""
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl", minutes=patience)
    lane = data.open_lane(0)
    first = [next(lane)[0]["tokens"].tolist() for _ in range(5)]
    gone = 50 * patience if patience < 1 else 30.0
    server.gone_until = time.monotonic() + gone
    rest = [sample["tokens"].tolist() for sample, _ in islice(lane, 400)]
    assert time.monotonic() > server.gone_until
    undisturbed = [sample["tokens"].tolist() for sample, _ in islice(opened(f"{url}/a.jsonl").open_lane(0), 405)]
    assert first + rest == undisturbed


def test_patience_ends(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)
    data = opened(f"{url}/a.jsonl", minutes=0.01)
    server.gone_until = time.monotonic() + 1000
    with pytest.raises(UserError, match=f"data.source={url}/a.jsonl: .* broke off .*data.retry_minutes=0.01.*checkpoint"):
        next(data.open_lane(0))


def changes(folder: Path, server: object) -> Iterator[tuple[str, list[str]]]:
    path = folder / "a.jsonl"
    content = path.read_bytes()
    server.etag = '"2"'
    yield "another version", ["has changed since the run started", 'was "1", now "2"']
    server.etag = '"1"'
    path.write_bytes(content + b'{"text": "more"}\n')
    yield "another size", ["has changed since the run started", f"was {len(content)} bytes, now {len(content) + 17} bytes"]
    path.unlink()
    yield "gone", ["404", "put the file back"]


def test_a_file_that_is_gone_or_changed_is_named_at_once(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)
    server.etag = '"1"'
    data = opened(f"{url}/a.jsonl", minutes=5.0)
    for _, words in changes(folder, server):
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            next(data.open_lane(0))
        assert time.monotonic() - started < 5
        assert all(word in str(caught.value) for word in [f"data.source={url}/a.jsonl: ", *words]), str(caught.value)


def test_a_resume_on_another_version_is_told_by_the_plan(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)
    server.etag = '"1"'
    before = opened(f"{url}/a.jsonl").plan()
    assert before == opened(f"{url}/a.jsonl").plan()
    server.etag = '"2"'
    after = opened(f"{url}/a.jsonl").plan()
    assert {key for key in before if before[key] != after[key]} == {"source_versions"}
    assert "source_versions" not in opened(str(folder / "a.jsonl")).plan()


def test_a_local_file_that_is_gone_or_changed_is_named(folder: Path) -> None:
    path = folder / "a.jsonl"
    data, content = opened(str(path)), path.read_bytes()
    path.write_bytes(content[:-1] + b" ")
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=f"data.source={path}: {path} has changed since the run started .it was written again"):
        next(data.open_lane(0))
    path.unlink()
    with pytest.raises(UserError, match=f"data.source={path}: {path} is no longer there"):
        next(data.open_lane(0))


def test_a_failing_server_is_tried_again_at_the_start_too(folder: Path, broken_server) -> None:
    url, server = broken_server(folder)
    server.gone_until = time.monotonic() + 1.0
    spec = ImageSpec("data.source", f"{url}/a.tar", retry_minutes=1.0)
    assert find_urls(spec, [f"{url}/a.tar"])[0].size == (folder / "a.tar").stat().st_size
    server.gone_until = time.monotonic() + 100.0
    with pytest.raises(UserError, match=f"data.source={url}/a.tar: cannot be read .*try again later"):
        find_urls(ImageSpec("data.source", f"{url}/a.tar", retry_minutes=0.01), [f"{url}/a.tar"])


@pytest.mark.slow
def test_a_run_goes_on_and_counts(folder: Path, broken_server, genscale, tmp_path: Path) -> None:
    """The same losses and samples as from a server that never failed; what it cost is in the metrics."""
    url, server = broken_server(folder)
    found = []
    for name, faults in (("calm", []), ("stormy", ["503", "reset", "none", "truncated", "429 0"])):
        server.faults = list(faults)
        retrying.retries.take()  # other tests' in this process
        model = ("--model.family=gpt", "--model.layers=1", "--model.heads=1", "--model.width=16", "--model.positions=32")
        data = (f"--data.source={url}/a.jsonl", "--data.lanes=2", "--data.sequence_length=32", "--data.validation_blocks=2")
        done = genscale("train", f"--run.dir={tmp_path}", f"--run.name={name}", *model, *data, "--train.steps=40",
                        "--train.global_batch_size=8", "--train.log_every=5", "--tracking.wandb=disabled")
        assert done.code == 0, done.err
        found.append(Run(tmp_path / name).metrics())
    calm, stormy = ([(line["step"], line["loss"], line["data_digest"]) for line in lines if "data_digest" in line]
                    for lines in found)
    assert calm == stormy and len(calm) == 8
    assert not any("retries" in line for line in found[0])
    counted = [line["retries"] for line in found[1] if "retries" in line]
    assert counted and counted == sorted(counted) and counted[-1] == len(server.met) - server.met.count("none") == 4
