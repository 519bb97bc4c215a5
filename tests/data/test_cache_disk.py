"""The token cache against what happens to machines: kills at any instant, disks too small and disks that fill up."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from genscale.data.text import cache as cache_module
from genscale.data.text import sources
from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError


@pytest.fixture(params=["memory", "stream"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stream":
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    return request.param


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"{number} {i} " * (i % 150)}) + "\n" for i in range(400))
    return folder


def data_of(corpus: Path, cache: Path | None) -> TextData:
    return TextData(TextDataSettings(source=str(corpus), lanes=4, sequence_length=128, shuffle_window=32,
                                     cache=cache and str(cache)), seed=3)


def lanes_of(data: TextData, count: int = 250) -> Iterator[list[tuple[list[int], dict]]]:
    for lane in range(4):
        yield [(sample["tokens"].tolist(), {**cursor, "place": {**cursor["place"], "at": None}})
               for sample, cursor in islice(data.open_lane(lane), count)]  # who does not read knows no byte to go on at


def test_a_kill_at_any_instant_leaves_right_tokens(corpus: Path, tmp_path: Path, kind: str) -> None:
    """Half of the killed processes build ahead, half train."""
    expected = list(lanes_of(data_of(corpus, None)))
    writer = Path(__file__).with_name("cache_writer.py")
    command = [sys.executable, str(writer), str(corpus), str(tmp_path / "cache"), kind, "8"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1 and any((tmp_path / "cache").rglob("*.tokens"))
    data = data_of(corpus, tmp_path / "cache")
    assert list(lanes_of(data)) == expected
    encoded = [stream.encoded for stream in data.streams]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)
    assert list(lanes_of(data_of(corpus, tmp_path / "cache"))) == expected


def test_a_disk_too_small_is_refused_at_once(corpus: Path, kind: str, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("500k")
    with pytest.raises(UserError, match=r"data.cache=.*will take about \d\.\d MB more, and 0\.\d MB are free.*make room"):
        data_of(corpus, disk / "cache")


def test_a_complete_cache_needs_no_room(corpus: Path, kind: str, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("8m")
    data = data_of(corpus, disk / "cache")
    encoded = [stream.encoded for stream in data.streams]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)
    _fill_up(disk)
    assert list(lanes_of(data_of(corpus, disk / "cache"), 50)) == list(lanes_of(data_of(corpus, None), 50))


def test_a_disk_that_fills_up_changes_no_sample(corpus: Path, kind: str, small_disk: Callable[[str], Path],
                                                monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cache_module, "FLUSH_TOKENS", 20_000)
    disk = small_disk("8m")
    data = data_of(corpus, disk / "cache")
    found = []
    with caplog.at_level(logging.WARNING, logger="genscale"):
        for lane in lanes_of(data):
            found.append(lane)
            _fill_up(disk)
        data.close()
    assert found == list(lanes_of(data_of(corpus, None)))
    warnings = [message for record in caplog.records if "data.cache" in (message := record.getMessage())]
    assert len(warnings) == 1 and "cannot be written any more (No space left on device): the run goes on" in warnings[0]
    (disk / "filler").unlink()
    assert list(lanes_of(data_of(corpus, disk / "cache"))) == found  # what reached the disk is right


def test_a_build_on_a_disk_that_fills_up_says_so(corpus: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("8m")
    data = data_of(corpus, disk / "cache")
    _fill_up(disk)
    encoded = [stream.encoded for stream in data.streams]
    with pytest.raises(UserError, match="data.cache=.*cannot be written any more.*make room"):
        build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)


def _fill_up(disk: Path) -> None:
    try:
        with (disk / "filler").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
