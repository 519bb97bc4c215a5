"""Labels are names first: which class an image is of, whatever kind of file says it and however it is spelt."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.labels import MOST_CLASSES, Classes, label_of
from genscale.errors import UserError

COUNT = 40


class Said(NamedTuple):
    """What stands in a label's file."""

    content: bytes


def png(number: int) -> bytes:
    """A picture of 4x4 pixels that are all its number."""
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, label: Callable[[int], Any], kind: str = "cls") -> Path:
    with tarfile.open(path, "w") as archive:
        for number in range(COUNT):
            said = label(number)
            if isinstance(said, Said):
                said = said.content
            else:
                said = str(said).encode() if kind == "cls" else json.dumps({"label": said}).encode()
            for ending, data in (("png", png(number)), (kind, said)):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_table(path: Path, label: Callable[[int], Any], names: list[str] | None = None) -> Path:
    import datasets

    table = pa.table({"image": [png(number) for number in range(COUNT)], "label": [label(number) for number in range(COUNT)]})
    if names:
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}).arrow_schema
        table = table.replace_schema_metadata(kinds.metadata)
    pq.write_table(table, path)
    return path


def write_arrays(path: Path, label: Callable[[int], Any]) -> Path:
    np.savez(path, images=np.stack([np.full((4, 4), number, np.uint8) for number in range(COUNT)]),
             labels=np.array([label(number) for number in range(COUNT)]))
    return path


def write_folders(path: Path, label: Callable[[int], str]) -> Path:
    for number in range(COUNT):
        (path / label(number)).mkdir(parents=True, exist_ok=True)
        (path / label(number) / f"{number}.png").write_bytes(png(number))
    return path


def opened(source: Path, **changes: Any) -> ImageData:
    settings = {"size": 4, "channels": 1, "labels": True, "lanes": 2, "validation_fraction": 0.2, **changes}
    return ImageData(ImageDataSettings(source=str(source), **settings), 1)


def named(data: ImageData) -> dict[int, str]:
    """Number of each image -> the name of its class; those of the first epoch, and those held out."""
    found = {int(sample["image"][0, 0, 0]): data.classes[int(sample["label"])] for sample in data.validation()}
    for lane in range(data.lane_count):
        for (sample, _), _ in zip(data.open_lane(lane), range(COUNT), strict=False):
            found[int(sample["image"][0, 0, 0])] = data.classes[int(sample["label"])]
    return found


def expected(label: Callable[[int], Any]) -> dict[int, str]:
    return {number: str(label(number)) for number in range(COUNT)}


CHARACTERS = "2345678ABC"


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_numbers_among_names_are_names(tmp_path: Path, kind: str) -> None:
    label = lambda number: (int(c) if (c := CHARACTERS[number % 10]).isdigit() else c)  # noqa: E731
    assert named(opened(write_tar(tmp_path / "a.tar", label, kind))) == expected(label)


@pytest.mark.parametrize("write", [write_tar, write_table, write_arrays])
def test_numbers_below_nought_are_classes_of_their_own(tmp_path: Path, write: Callable[..., Path]) -> None:
    ending = {write_tar: "tar", write_table: "parquet", write_arrays: "npz"}[write]
    data = opened(write(tmp_path / f"a.{ending}", lambda number: number % 3 - 1))
    assert data.classes == ["-1", "0", "1"] and named(data) == expected(lambda number: number % 3 - 1)


@pytest.mark.parametrize("write", [write_table, write_arrays])
@pytest.mark.parametrize("label", [float, np.float32, Decimal, lambda number: bool(number)])
def test_whole_numbers_of_any_type_are_whole_numbers(tmp_path: Path, write: Callable[..., Path], label: type) -> None:
    if write is write_arrays and label is Decimal:
        pytest.skip("numpy has no such type")
    ending = "parquet" if write is write_table else "npz"
    data = opened(write(tmp_path / f"a.{ending}", lambda number: label(number % 2)))
    assert data.classes == ["0", "1"] and named(data) == expected(lambda number: number % 2)


@pytest.mark.parametrize("names", [["10", "2", "3"], ["01", "02", "10"], ["2.0", "3.0", "10.0"]])
def test_folders_called_by_numbers_and_the_numbers_of_other_sources_agree(tmp_path: Path, names: list[str]) -> None:
    folders = write_folders(tmp_path / "folders", lambda number: names[number % 3])
    for other in (write_tar(tmp_path / "a.tar", lambda number: int(float(names[number % 3]))),
                  write_table(tmp_path / "a.parquet", lambda number: float(names[number % 3])),
                  write_arrays(tmp_path / "a.npz", lambda number: int(float(names[number % 3])))):
        data = opened(folders, validation_source=str(other))
        held = {int(sample["image"][0, 0, 0]): data.classes[int(sample["label"])] for sample in data.validation()}
        assert data.classes == sorted(names) and held == expected(lambda number: names[number % 3])


def test_a_number_counts_the_classes_where_none_is_called_by_one(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", lambda number: number % 3)
    names = ["cat", "ant", "bee"]
    assert named(opened(source, class_names=names)) == expected(lambda number: names[number % 3])
    assert named(opened(source, class_names=["2", "1", "0"])) == expected(lambda number: number % 3)
    with pytest.raises(UserError, match=r"the label 0, which is none of the 3 classes 7, 8, 9 \(where classes are called by "):
        opened(source, class_names=["7", "8", "9"])
    with pytest.raises(UserError, match="the label 1, which may be the class 01 or 1.0; set data.class_names"):
        opened(source, class_names=["0", "01", "1.0", "2"])
    with pytest.raises(UserError, match=r"label 2, which is none of the 2 classes a, b \(a number counts them, from 0 to 1\)"):
        opened(source, class_names=["a", "b"])
    with pytest.raises(UserError, match="data.class_names: two classes of .* are called é"):
        opened(source, class_names=["é", "x", unicodedata.normalize("NFD", "é")])


def test_each_table_counts_its_own_classes(tmp_path: Path) -> None:
    """ClassLabel columns: the numbers of two tables stand for other names."""
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train.parquet", lambda number: number % 3, ["10", "2", "3"])
    write_table(tmp_path / "data" / "test.parquet", lambda number: number % 3, ["2", "3", "10"])
    data = opened(tmp_path / "data")
    assert data.classes == ["10", "2", "3"]
    held = Counter((int(sample["image"][0, 0, 0]), data.classes[int(sample["label"])]) for sample in data.validation())
    assert held == Counter((number, ["2", "3", "10"][number % 3]) for number in range(COUNT))
    one = tmp_path / "data" / "train.parquet"
    assert named(opened(one, class_names=["3", "2", "10"])) == expected(lambda number: ["10", "2", "3"][number % 3])
    assert named(opened(one, class_names=["x", "y", "z"])) == expected(lambda number: "xyz"[number % 3])
    unlabelled = write_table(tmp_path / "b.parquet", lambda number: -1 if number == 7 else 0, ["a", "b"])
    other = write_table(tmp_path / "c.parquet", lambda number: number % 3, ["cat", "dog", "owl"])
    with pytest.raises(UserError, match="validation_source=.*row 0 of c.parquet has the label 'cat', which is none of the 3"):
        opened(one, validation_source=str(other))
    with pytest.raises(UserError, match="1 of 40 have none, the first is row 7 of b.parquet|row 7 of b.parquet .*has no label"):
        opened(unlabelled)


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    label = lambda number: ("tea", composed, apart)[number % 3]  # noqa: E731
    for source in (write_tar(tmp_path / "a.tar", label), write_table(tmp_path / "a.parquet", label),
                   write_arrays(tmp_path / "a.npz", label), write_folders(tmp_path / "folders", label)):
        for names in (None, ["tea", apart]):
            data = opened(source, class_names=names)
            assert set(data.classes) == {"tea", composed}
            assert named(data) == expected(lambda number: composed if number % 3 else "tea")


def test_bytes_of_other_encodings_are_names_of_their_own(tmp_path: Path) -> None:
    write = lambda path, name: write_tar(path, lambda number: Said(name(number)))  # noqa: E731
    assert opened(write(tmp_path / "a.tar", lambda number: bytes([0xE8 + number % 2]))).classes == ["\\xe8", "\\xe9"]
    assert named(opened(write(tmp_path / "b.tar", lambda number: f"{number % 3}".encode("utf-8-sig")))) == expected(
        lambda number: number % 3)


@pytest.mark.parametrize(("content", "words"), [
    ({"class": 1, "id": 2}, "data.label_column=label: 000.json of a.tar of .* has the fields class, id; set data.label_co"),
    (3, "000.json of a.tar holds 3, and a label is read from an object with the field label"),
])
def test_json_without_the_label_is_named(tmp_path: Path, content: Any, words: str) -> None:
    source = write_tar(tmp_path / "a.tar", lambda number: Said(json.dumps(content).encode()), "json")
    with pytest.raises(UserError, match=words):
        opened(source)


@pytest.mark.parametrize(("label", "words"), [
    (lambda number: number / 7 + 0.5, "row 0 of a.parquet of .* has the label 0.5, and a class is a whole number or a"),
    (lambda number: [number, 1], r"has the label \[0, 1\], and a class is"),
    (lambda number: None if number == 5 else 1, "not all images of .* have a label: 1 of 40 have none, the first is row 5"),
    (lambda number: number * 100_000, f"make 3,900,001 classes .*the largest label is 3900000.* and {MOST_CLASSES:,} at most"),
])
def test_what_is_no_class_is_named(tmp_path: Path, label: Callable[[int], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        opened(write_table(tmp_path / "a.parquet", label))


def test_images_without_a_label_are_named(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "folders", lambda number: "ab"[number % 2])
    (source / "left.png").write_bytes(png(0))
    with pytest.raises(UserError, match="1 of 41 have none, the first is left.png"):
        opened(source)


def test_empty_and_single_classes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(write_tar(tmp_path / "a.tar", lambda number: number % 3 + 1))
    assert "1 of 4 classes have no image to train on: 0; data.class_names can name" in caplog.text
    caplog.clear()
    data = opened(tmp_path / "a.tar", class_names=["1", "2", "3"])
    assert named(data) == expected(lambda number: number % 3 + 1) and "no image" not in caplog.text
    write_folders(tmp_path / "folders", lambda number: "ab"[number % 2])
    (tmp_path / "folders" / "c").mkdir()
    (tmp_path / "folders" / ".git").mkdir()
    assert opened(tmp_path / "folders").classes == ["a", "b"] and "its folder c holds no image" in caplog.text
    write_arrays(tmp_path / "a.npz", lambda number: f"caption {number:02}")
    opened(tmp_path / "a.npz", validation_source=str(tmp_path / "a.npz"))
    assert "40 images to train on are of 40 classes" in caplog.text


def test_streams_name_them_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    label = lambda number: CHARACTERS[number % 10]  # noqa: E731
    data = opened(write_tar(tmp_path / "a.tar", label), class_names=list(CHARACTERS))
    assert data.plan()["order"] == "stream" and named(data) == expected(label)


@pytest.mark.parametrize(("value", "label"), [
    (b"cat", "cat"), ("", None), (float("nan"), None), (2.0, 2), (Decimal("3"), 3), (0.5, 0.5), (-0.0, 0), ("e\u0301", "é"),
    (float("inf"), float("inf")),
])
def test_values_as_labels(value: Any, label: Any) -> None:
    assert label_of(value) == label


def test_booleans_find_their_names() -> None:
    classes = Classes(["true", "false"], "here")
    assert [classes.number(True, "x"), classes.number(False, "x")] == [0, 1]
    assert Classes(["no", "yes"], "here").number(True, "x") == 1
