"""A table of images may name them by their path: one that leads out of its folder reads no file of this machine."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data.images.shards import ImageSpec
from genscale.data.images.sources import Order, open_images
from genscale.errors import UserError


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """<tmp>/table beside a secret, which links in it lead to."""
    (tmp_path / "secret.png").write_bytes(png(99))
    found = tmp_path / "table"
    (found / "images").mkdir(parents=True)
    for number in range(3):
        (found / "images" / f"{number}.png").write_bytes(png(number))
    (found / "link.png").symlink_to(tmp_path / "secret.png")
    (found / "up").symlink_to(tmp_path)
    (found / "circle.png").symlink_to("circle.png")
    os.mkfifo(found / "pipe.png")
    return found


def contents(folder: Path, *paths: str) -> list[bytes]:
    """What is read of a table that names these files."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells: list[dict[str, Any]] = [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), folder / "a.parquet")
    found = open_images(ImageSpec("data.source", str(folder / "a.parquet")), Order(0.0, 4, 1, 1), 1).training
    return [found.read(i) for i in range(len(found))]


@pytest.mark.parametrize("path", ["{}/secret.png", "../secret.png", "images/../../secret.png", "link.png", "up/secret.png",
                                  "{}/table/up/secret.png", "/etc/hostname", "/dev/zero"])
def test_a_path_out_of_the_tables_folder_is_refused(folder: Path, path: str) -> None:
    path = path.format(folder.parent)
    with pytest.raises(UserError) as caught:
        contents(folder, "images/0.png", path)
    said = str(caught.value)
    assert said.startswith(f"data.source={folder}/a.parquet: row 1 of a.parquet names the file {path}, ")
    assert f"is not in the table's folder {folder.resolve()}" in said


@pytest.mark.parametrize(("path", "reason"), [
    ("images/3.png", "is not there"), ("images", "is not there"), ("pipe.png", "is not there"), ("circle.png", ""),
    ("images/0.png\0", ""), ("file://{}/secret.png", "is not there"),
    ("hf://datasets/someone/private@main/0.png", "is not there"),
    ("https://127.0.0.1:9/0.png", "is not there"), ("zip://0.png::https://127.0.0.1:9/a.zip", "is not there"),
])
def test_a_path_to_no_file_is_named(folder: Path, path: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"row 0 of a.parquet names the file .*, which .*{reason}"):
        contents(folder, path.format(folder.parent))


def test_a_file_in_the_tables_folder_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    paths = ["images/0.png", str(folder / "images" / "1.png"), "images/../images/2.png"]
    assert contents(folder, *paths) == [png(0), png(1), png(2)]
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(folder)
    assert contents(link, str(link / "images" / "1.png"), str(folder / "images" / "2.png")) == [png(1), png(2)]
