"""The token cache where processes meet, parts get lost, lanes change and nothing but an upper bound of its size is known."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data.loader import StepLoader
from genscale.data.readers import TableShard
from genscale.data.text import cache as cache_module
from genscale.data.text import cache_shard, sources
from genscale.data.text.cache import TokenCache
from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.tokenizers import ByteTokenizer
from genscale.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    with (tmp_path / "corpus" / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} words " * (1 + i % 30), "id": i}) + "\n" for i in range(300))
    return tmp_path / "corpus"


def data_of(source: Path, cache: Path | None, **changes: Any) -> TextData:
    chosen = {"source": str(source), "lanes": 2, "sequence_length": 64, "shuffle_window": 64, "cache": cache and str(cache)}
    return TextData(TextDataSettings(**{**chosen, **changes}), seed=1)


def fill(data: TextData) -> None:
    encoded = [stream.encoded for stream in data.streams]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)


def test_a_cache_that_another_process_begins_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir, identity = os.scandir, {"order": "memory"}

    def late(path: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            TokenCache(tmp_path / "cache", ByteTokenizer(), identity).append(0, 0, 0, True, np.arange(5), 5)
        return scandir(path)
    monkeypatch.setattr(cache_module.os, "scandir", late)
    TokenCache(tmp_path / "cache", ByteTokenizer(), identity)


def test_lost_tokens_are_read_again_in_one_pass_a_window(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    expected = [sample["tokens"].tolist() for sample, _ in islice(data_of(corpus, None).open_lane(1), 40)]
    fill(data_of(corpus, tmp_path / "cache"))
    data, passes, rows = data_of(corpus, tmp_path / "cache"), [], TableShard.rows
    source = data.streams[0].source
    windows = list(islice(source.windows(1, None, data.streams[0].encoded.cache.training_rows), 2))

    def noted(shard: TableShard, *place: int) -> Iterator[tuple[int, str]]:
        passes.append(place)
        return rows(shard, *place)
    monkeypatch.setattr(TableShard, "rows", noted)
    texts = {int(row): window.text(n) for window in windows for n, row in enumerate(window.rows)}
    assert len(passes) == 2 and len(texts) == 128
    assert all(text == f"{row} words " * (1 + row % 30) for row, text in texts.items())
    assert [sample["tokens"].tolist() for sample, _ in islice(data.open_lane(1), 40)] == expected


def test_all_shards_together_look_no_longer_than_a_process_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [1000.0], []
    monkeypatch.setattr(cache_shard.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cache_shard, "LOOKING", cache_shard._Allowance())
    indexes = [cache_shard.ShardIndex(tmp_path / str(i), np.dtype("<u2")) for i in range(10)]

    def is_dir(path: Path) -> bool:
        looks.append(path)
        clock[0] += 0.5
        return False
    for index in indexes:
        index.refresh(0.0)
    monkeypatch.setattr(Path, "is_dir", is_dir)
    begun = clock[0]
    while clock[0] < begun + 1000:
        for index in indexes:
            index.refresh(0.0)
        clock[0] += 0.1
    assert 0.8 * 50 < 0.5 * len(looks) < 50 + 3  # a twentieth of 1,000 s, and what was saved up


@pytest.mark.parametrize("filters", [None, {"id": "<3"}])
def test_sizes_before_filters_are_no_reason_to_refuse(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture, filters: dict | None) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10_000, 10_000))
    chosen = {"filters": filters, "validation_source": str(corpus)}
    if filters is None:
        with pytest.raises(UserError, match="data.cache=.*make room"):
            data_of(corpus, tmp_path / "cache", **chosen)
    else:
        with caplog.at_level(logging.WARNING, logger="genscale"):
            data_of(corpus, tmp_path / "cache", **chosen)
        assert "less what filters" in caplog.text


def test_row_groups_that_follow_the_lanes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    table = pa.table({"text": [f"document {i} " * 9 for i in range(200)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    fill(data_of(tmp_path / "a.parquet", tmp_path / "cache", lanes=1))
    with pytest.raises(UserError, match="data.cache=.*another source.*was data.lanes another"):
        data_of(tmp_path / "a.parquet", tmp_path / "cache", lanes=4)


def test_worker_processes_write_out_what_they_keep_back(corpus: Path, tmp_path: Path) -> None:
    data = data_of(corpus, tmp_path / "cache")
    loader = StepLoader(data, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1, workers=2, prefetch_steps=2)
    for _ in range(20):
        loader.next_batch()
    loader.close()  # far less was read than is flushed on the way
    assert data_of(corpus, tmp_path / "cache").streams[0].encoded.cache.totals(1)["tokens"] > 1000
