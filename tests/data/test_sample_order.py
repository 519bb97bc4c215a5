"""The order of the samples from every rank's StepLoader: the same for any number of processes, workers and micro-batches.

(benchmarks/sample_order.py reads the whole table.)
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.data.text import sources
from genscale.data.text.data import SourceSettings, TextData, TextDataSettings

GLOBAL, LANES = 24, 12
Shape = tuple[int, int, int]
"""(processes, workers, micro-batch)."""


@pytest.fixture
def opened(tmp_path: Path, serve, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Data]:
    """opened(kind) -> data of that kind, read as those are that do not fit in memory (but for the folder)."""
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    texts = [f"document {i} " + "abc"[i % 3] * (i % 50) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts[::-1]}), tmp_path / "a.parquet", row_group_size=20)
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(110):
            Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "images" / f"{i:03}.png")
            archive.add(tmp_path / "images" / f"{i:03}.png", f"{i:03}.png")

    def text(source: str | None = None, **changes: Any) -> TextData:
        chosen = {"source": source} if source else {}
        return TextData(TextDataSettings(**chosen, lanes=LANES, sequence_length=16, shuffle_window=8, **changes), seed=5)

    def images(source: Path) -> ImageData:
        return ImageData(ImageDataSettings(source=str(source), size=4, channels=1, lanes=LANES, window=4), seed=5)

    def make(kind: str) -> Data:
        if kind == "mixture":
            entries = [SourceSettings(str(tmp_path / "a.jsonl"), 0.7), SourceSettings(str(tmp_path / "a.parquet"), 0.3)]
            return text(sources=entries)
        return {"jsonl": lambda: text(str(tmp_path / "a.jsonl")), "tar": lambda: images(tmp_path / "a.tar"),
                "parquet over HTTP": lambda: text(f"{serve(tmp_path)[0]}/a.parquet"),
                "folder": lambda: images(tmp_path / "images")}[kind]()
    return make


KINDS = ["jsonl", "parquet over HTTP", "tar", "folder", "mixture"]


def definition(data: Data, batches: int) -> list[bytes]:
    """The first global samples: number g is the one at g // lanes in lane g % lanes."""
    lanes = [data.open_lane(lane) for lane in range(data.lane_count)]
    samples = (next(lanes[g % data.lane_count])[0] for g in range(GLOBAL * batches))
    return [b"".join(np.asarray(sample[name]).astype(np.int64).tobytes() for name in sorted(sample)) for sample in samples]


def run(data: Data, legs: Sequence[tuple[Shape, int]]) -> list[bytes]:
    """The samples of a run in legs of (shape, global batches), each taken up where the one before it ended."""
    found: dict[int, bytes] = {}
    state = None
    for (world, workers, micro), batches in legs:
        states = []
        for rank in range(world):
            loader = StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=micro, rank=rank, world_size=world,
                                workers=workers, prefetch_steps=1, state=json.loads(json.dumps(state)))
            for batch in (batch for _ in range(batches) for batch in loader.next_batch()):
                numbers = batch.pop("sample").tolist()
                assert not found.keys() & set(numbers)
                found |= {number: b"".join(batch[name][i].long().numpy().tobytes() for name in sorted(batch))
                          for i, number in enumerate(numbers)}
            states.append(loader.state())
            loader.close()
        state = merge_states(states, data.lane_count)
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if "HTTP" in kind else kind for kind in KINDS])
def test_one_order_at_any_shape_and_after_three_resumes(opened: Callable[[str], Data], kind: str) -> None:
    data = opened(kind)
    expected = definition(data, 4)
    for world, micro in [(1, 24), (2, 4), (3, 8), (4, 1), (8, 3)]:
        assert run(data, [((world, 0, micro), 2)]) == expected[: 2 * GLOBAL]
    assert run(data, [((8, 0, 1), 1), ((3, 0, 4), 1), ((1, 0, 8), 1), ((4, 0, 6), 1)]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shapes"), [
    ("parquet over HTTP", [(3, 1, 8), (1, 2, 6)]), ("tar", [(2, 2, 12), (4, 1, 2)]),
    *(pytest.param(kind, shapes, marks=pytest.mark.matrix) for kind, shapes in (
        ("jsonl", [(1, 4, 24), (2, 1, 3)]), ("folder", [(1, 1, 1), (2, 2, 4)]),
        ("mixture", [(2, 1, 6), (1, 4, 24)])))])  # fmt: skip
def test_workers_change_nothing(opened: Callable[[str], Data], kind: str, shapes: list[Shape]) -> None:
    data = opened(kind)
    assert run(data, [(shape, 2) for shape in shapes]) == definition(data, 4)


def test_an_epoch_ends_inside_a_batch_and_nothing_is_lost(opened: Callable[[str], Data]) -> None:
    """The last batch of an epoch that is no multiple of the global batch is filled up by the next epoch."""
    data = opened("folder")
    count = data.order.count
    assert count % GLOBAL
    samples = run(data, [((2, 0, 6), 6), ((3, 0, 8), 5), ((1, 0, 24), 3)])
    epochs = [samples[first : first + count] for first in range(0, 3 * count, count)]
    assert all(len(set(epoch)) == len(epoch) == count and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_document_of_a_stream_once_an_epoch_through_the_loader(opened: Callable[[str], Data]) -> None:
    """Of a stream every lane begins its next epoch by itself: nothing is left out, nothing comes twice before."""
    data = opened("tar")
    per_lane = [sum(1 for _ in zip(iter(lambda lane=lane: next(lane)[1]["epoch"], 1), range(1000), strict=False))
                for lane in (data.open_lane(lane) for lane in range(LANES))]
    samples = run(data, [((4, 0, 3), 2), ((2, 0, 12), 5)])
    first = [sample for g, sample in enumerate(samples) if g // LANES < per_lane[g % LANES]]
    assert len(first) == sum(per_lane) == 110 - held_out(data) and len(set(first)) == len(first)


def held_out(data: Data) -> int:
    return sum(1 for _ in data.order._stream.held_out())
