"""Damaged images: counted, named once, replaced alike at any shape, and refused where they are many."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.loader import StepLoader
from genscale.errors import UserError

COUNT = 120
BAD = {17, 18, 60}


def png(number: int) -> bytes:
    """An image whose every pixel is its number."""
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()[: 20 if number in BAD else None]


@pytest.fixture(params=["folder", "tar"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        for i in range(COUNT):
            (tmp_path / f"{i:03}.png").write_bytes(png(i))
        return str(tmp_path)
    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(COUNT):
            member = tarfile.TarInfo(f"{i:03}.png")
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
    return str(tmp_path / "a.tar")


def opened(source: str, bad_share: float) -> ImageData:
    settings = ImageDataSettings(source=source, size=4, channels=1, lanes=6, window=8, bad_share=bad_share,
                                 validation_fraction=0.1)
    return ImageData(settings, 2)


def values(data: ImageData, world: int, batches: int) -> list[int]:
    """The first global samples, read by so many ranks."""
    found = {}
    for rank in range(world):
        loader = StepLoader(data, global_batch_size=12, micro_batch_size=12 // world, rank=rank, world_size=world, workers=0,
                            prefetch_steps=1)
        for _ in range(batches):
            batch, = loader.next_batch()
            found |= dict(zip(batch["sample"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
        loader.close()
    return [found[g] for g in sorted(found)]


def test_others_take_their_places_and_are_the_same_at_any_shape(source: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="genscale"):
        data = opened(source, 0.1)
        alone = values(data, 1, 20)
    named = [record.getMessage() for record in caplog.records]
    held = {int(sample["image"][0, 0, 0]) for sample in data.validation()}
    trained = BAD - {i for i in BAD if f"{i:03}" not in "".join(named)}
    assert trained and all(sum(f"{i:03}" in line and "damaged" in line for line in named) == 1 for i in trained), named
    assert Counter(alone).keys() == set(range(COUNT)) - BAD - held
    assert data.order.reader.bad >= 2 * len(trained) - 1  # two epochs
    for world in (2, 3):
        assert values(opened(source, 0.1), world, 20) == alone


def test_worker_processes_name_them_in_the_log_of_their_rank(source: str, tmp_path: Path) -> None:
    logger, file = logging.getLogger("genscale"), logging.FileHandler(tmp_path / "rank.log")
    file.setFormatter(logging.Formatter("LINE %(message)s"))
    logger.addHandler(file)
    try:
        data = opened(source, 0.2)
        opening = (tmp_path / "rank.log").read_text()  # what is held out is decoded here
        loader = StepLoader(data, global_batch_size=100, micro_batch_size=100, rank=0, world_size=1, workers=1,
                            prefetch_steps=1)
        loader.next_batch()
        loader.close()
    finally:
        logger.removeHandler(file)
        file.close()
    lines = (tmp_path / "rank.log").read_text().removeprefix(opening).splitlines()
    assert lines and all(line.startswith(f"LINE data.source={source}: ") and "damaged" in line for line in lines)


def test_too_many_of_them_end_the_run(source: str) -> None:
    data = opened(source, 0.0)
    with pytest.raises(UserError) as caught:
        for lane in range(6):
            list(islice(data.open_lane(lane), 40))
    assert str(caught.value).startswith(f"data.source={source}: ")
    assert "images read are damaged" in str(caught.value) and "data.bad_share above 0.0" in str(caught.value)
    assert data.order.reader.read >= 100


def test_a_source_of_nothing_else_is_refused(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(f"no image {i}".encode())
    with pytest.raises(UserError, match=f"data.source={tmp_path}: all of its images that were read are damaged"):
        opened(str(tmp_path), 1.0)


def test_an_empty_cell_of_a_table_is_a_damaged_image(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [png(i) if i % 10 else None for i in range(1, 81)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "a.parquet")
    data = opened(str(tmp_path / "a.parquet"), 0.3)
    seen = np.array([sample["image"][0, 0, 0] for sample, _ in islice(data.open_lane(0), 60)])
    assert data.order.reader.bad > 0 and not np.isin(seen, [10, 20, *BAD]).any()
