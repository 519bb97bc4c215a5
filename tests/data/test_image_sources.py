"""What `data.source` can be: images, labels and class names of each kind, and mistakes about them in one line."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data.images import sources as image_sources
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.errors import UserError

CLASSES = ["apple", "bear", "cat"]


def png(number: int) -> bytes:
    """A picture of 4x4 pixels that are all its number."""
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


def opened(source: object, seed: int = 1, **changes: Any) -> ImageData:
    settings = {"size": 4, "channels": 1, "labels": True, "lanes": 4, "validation_fraction": 0.2, **changes}
    return ImageData(ImageDataSettings(source=source if isinstance(source, list) else str(source), **settings), seed)


def content(data: ImageData) -> dict[int, str]:
    """Number of each image in the first epoch -> the name of its class, as far as `data` trains on it."""
    found: dict[int, str] = {}
    for lane in range(data.lane_count):
        for (sample, cursor), _ in zip(data.open_lane(lane), range(200), strict=False):
            if cursor.get("epoch", 0) > 0 or cursor.get("position", 0) * data.lane_count - data.lane_count + lane >= (
                    data.order.count or 10**9):
                break
            found[int(sample["image"][0, 0, 0])] = data.classes[int(sample["label"])] if data.classes else ""
    return found


def held(data: ImageData) -> dict[int, str]:
    """The same of the validation set."""
    return {int(sample["image"][0, 0, 0]): data.classes[int(sample["label"])] for sample in data.validation()}


def of_class(numbers: range | list[int]) -> dict[int, str]:
    return {number: CLASSES[number % 3] for number in numbers}


def write_tar(path: Path, numbers: range, label: Callable[[int], tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for number in numbers:
            for extension, data in (("txt", b"x"), ("png", png(number)), label(number)):
                member = tarfile.TarInfo(f"{number:03}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: range, labels: Any = None, metadata: bool = True) -> None:
    import datasets

    table = pa.table({"image": pa.array([{"bytes": png(number), "path": f"{number}.png"} for number in numbers]),
                      "label": pa.array(labels if labels is not None else [number % 3 for number in numbers])})
    if metadata:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        table = table.cast(features.arrow_schema)
    pq.write_table(table, path, row_group_size=10)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = opened("digits", size=8, validation_fraction=0.1)
    assert data.classes == list("0123456789") and (data.size, data.channels) == (8, 1)
    samples = [next(lane)[0] for lane in [data.open_lane(0)] for _ in range(100)] + data.validation()
    there = {(image * 255 / 16).round().astype(np.uint8).tobytes(): label
             for image, label in zip(digits.images, digits.target, strict=True)}
    assert all(there[sample["image"].tobytes()] == sample["label"] for sample in samples)
    assert data.order.count + len(data.validation()) == 1797 and 130 < len(data.validation()) < 230


@pytest.mark.parametrize("validation", ["test", "val"])
def test_a_folder_of_npz_files_and_of_image_folders_bring_their_validation_sets(tmp_path: Path, validation: str) -> None:
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / "classes.json").write_text(json.dumps(CLASSES))
    for part, numbers in (("train", range(60)), (validation, range(60, 90))):
        images = np.stack([np.full((4, 4), number, np.uint8) for number in numbers])
        np.savez_compressed(tmp_path / "npz" / f"{part}.npz", images=images, labels=np.array(numbers) % 3)
        for number in numbers:
            folder = tmp_path / "folder" / part / CLASSES[number % 3] / "deeper"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(png(number))
    for source in ("npz", "folder"):
        data = opened(tmp_path / source)
        assert data.classes == CLASSES
        assert content(data) == of_class(range(60)) and held(data) == of_class(range(60, 90))
    one = opened(tmp_path / "npz" / "train.npz")
    assert content(one) | held(one) == of_class(range(60)) and not content(one).keys() & held(one).keys()
    other = opened(tmp_path / "npz" / "train.npz", validation_source=str(tmp_path / "folder" / validation))
    assert content(other) == of_class(range(60)) and held(other) == of_class(range(60, 90))


@pytest.mark.parametrize("streamed", [False, True])
def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    write_parquet(tmp_path / "train-0.parquet", range(35))
    write_parquet(tmp_path / "train-1.parquet", range(35, 60))
    write_parquet(tmp_path / "test-0.parquet", range(60, 80))
    data = opened(tmp_path)
    assert data.plan()["order"] == ("stream" if streamed else "images")
    assert content(data) == of_class(range(60)) and held(data).items() <= of_class(range(60, 80)).items() and held(data)
    data = opened([str(tmp_path / "train-0.parquet"), str(tmp_path / "test-0.parquet")])
    assert content(data) | held(data) == of_class([*range(35), *range(60, 80)])
    assert not content(data).keys() & held(data).keys()
    assert opened(tmp_path, labels=False).classes is None and "label" not in opened(tmp_path, labels=False).validation()[0]


@pytest.mark.parametrize(("kind", "mode"), [("cls", "w"), ("names", "w"), ("json", "w:gz")])
@pytest.mark.parametrize("streamed", [False, True])
def test_tar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, streamed: bool) -> None:
    if streamed:
        monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    label = {"cls": lambda number: ("cls", b"%d\n" % (number % 3)),
             "names": lambda number: ("cls", CLASSES[number % 3].encode()),
             "json": lambda number: ("json", json.dumps({"label": number % 3, "caption": "x"}).encode())}[kind]
    names = [tmp_path / f"{part}.tar{'.gz' if mode == 'w:gz' else ''}" for part in range(2)]
    for part, name in enumerate(names):
        write_tar(name, range(part * 40, part * 40 + 40), label, mode)
    if streamed:
        with pytest.raises(UserError, match="data.class_names=None: .*does not tell the names of its classes"):
            opened(tmp_path)
    data = opened(tmp_path, class_names=CLASSES)
    assert content(data) | held(data) == of_class(range(80)) and not content(data).keys() & held(data).keys()


def test_string_labels_become_sorted_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(30), [CLASSES[number % 3] for number in range(30)], metadata=False)
    data = opened(tmp_path / "a.parquet")
    assert data.classes == CLASSES and content(data) | held(data) == of_class(range(30))
    np.savez(tmp_path / "a.npz", images=np.stack([np.full((4, 4, 1), i, np.uint8) for i in range(30)]),
             labels=np.array([CLASSES[i % 3] for i in range(30)]))
    data = opened(tmp_path / "a.npz", class_names=CLASSES[::-1])
    assert data.classes == CLASSES[::-1] and content(data) | held(data) == of_class(range(30))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("ranges", [True, False])
def test_urls_are_read_like_files(tmp_path: Path, serve: Callable, monkeypatch: pytest.MonkeyPatch, streamed: bool,
                                  ranges: bool) -> None:
    if streamed:
        monkeypatch.setattr(image_sources, "MEMORY_LIMIT", 0)
    write_tar(tmp_path / "a.tar", range(40), lambda number: ("cls", b"%d" % (number % 3)))
    write_parquet(tmp_path / "b.parquet", range(40, 80))
    url, _ = serve(tmp_path, ranges)
    data = opened(f"{url}/a.tar?token=1", class_names=CLASSES)
    assert content(data) | held(data) == of_class(range(40)) and not content(data).keys() & held(data).keys()
    if ranges:
        data = opened(f"{url}/b.parquet", validation_source=f"{url}/a.tar")
        assert content(data) == of_class(range(40, 80)) and held(data) == of_class(range(40))
    else:
        with pytest.raises(UserError, match=f"data.source={url}/b.parquet: .*parts of a file"):
            opened(f"{url}/b.parquet")


def test_cells_with_a_path_in_the_place_of_bytes(tmp_path: Path) -> None:
    cells = []
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        cells.append({"bytes": None, "path": str(tmp_path / f"{number}.png")})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "label": [number % 3 for number in range(30)]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = opened(tmp_path / "a.parquet", class_names=CLASSES)
    assert content(data) | held(data) == of_class(range(30))


def test_a_file_that_is_gone_is_not_replaced(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"._{number}.png").write_bytes(b"what macOS leaves beside it")
    data = opened(tmp_path, labels=False, bad_share=0.0)
    for number in range(30):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(UserError, match=f"data.source={tmp_path}: cannot be read .*start the run again"):
        next(data.open_lane(0))


def test_only_what_validation_needs_is_opened(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(20))
    settings = ImageDataSettings(source="nowhere", size=4, channels=1, validation_source=str(tmp_path / "a.parquet"))
    assert len(ImageData(settings, 1, for_training=False).validation()) == 20


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """Sources with something wrong about each."""
    images, labels = np.zeros((6, 4, 4), np.uint8), np.arange(6)
    np.savez(tmp_path / "names.npz", image=images)
    np.savez(tmp_path / "float.npz", images=images - 3000.5, labels=labels)
    np.savez(tmp_path / "labels.npz", images=images, labels=labels[:5])
    np.savez(tmp_path / "none.npz", images=images)
    np.savez(tmp_path / "good.npz", images=images, labels=labels)
    (tmp_path / "damaged.npz").write_bytes(b"PK no zip")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "one" / "png").mkdir(parents=True)
    (tmp_path / "one" / "png" / "0.png").write_bytes(png(0))
    write_parquet(tmp_path / "images.parquet", range(20))
    table = pa.table({"img": [png(0)], "text": ["a"], "label": [0]})
    pq.write_table(table, tmp_path / "img.parquet")
    (tmp_path / "short.tar").write_bytes(b"no tar " * 300)
    return tmp_path


@pytest.mark.parametrize(("source", "changes", "words"), [
    ("god.npz", {}, ["data.source={}/god.npz: there is no such file", "did you mean 'good.npz'"]),
    ("good.npz", {"validation_source": "nowhere/x.npz"}, ["data.validation_source=nowhere/x.npz: there is no such file"]),
    ("good.npz", {"validation_source": "{}/none.npz"}, ["not all images of data.validation_source={}/none.npz have a label"]),
    ("good.npz", {"validation_source": "digits"}, ["data.validation_source=digits: has the classes", "not 0, 1, 2, 3, 4, 5"]),
    ("names.npz", {}, ["holds the arrays image", "images"]),
    ("float.npz", {}, ["data.value_range=None: ", "float64", "from -3000.5 to"]),
    ("labels.npz", {}, ["the array labels", "one for each of the 6"]),
    ("none.npz", {}, ["data.labels=true: ", "data.labels to false"]),
    ("good.npz", {"value_range": (5.0, 5.0)}, ["data.value_range: [5.0, 5.0] makes black and white the same"]),
    ("good.npz", {"class_names": ["a", "b"]}, ["the label 2", "none of the 2 classes a, b", "data.class_names"]),
    ("damaged.npz", {}, ["damaged.npz cannot be read"]),
    ("damaged.parquet", {}, ["damaged.parquet is damaged or not what its name says"]),
    ("short.tar", {}, ["short.tar is damaged or not what its name says"]),
    ("empty", {}, ["the folder holds no image", "train.npz"]),
    ("notes.txt", {}, ["files of this kind are not read; .npz, .parquet, .tar"]),
    ("one", {}, ["data.labels=true: ", "in its folder png", "one folder for each class"]),
    ("img.parquet", {}, ["data.image_column=image: ", "has the columns img, text, label", "did you mean 'img'", "the images"]),
    ("img.parquet", {"image_column": "text"}, ["data.image_column=text: ", "it holds string, not the bytes"]),
    ("images.parquet", {"label_column": "labels"}, ["data.label_column=labels: ", "did you mean 'label'", "to false"]),
    ("https://127.0.0.1:9/a.npz", {}, ["cannot be read"]),
])
def test_mistakes_are_one_line(wrong: Path, source: str, changes: dict[str, Any], words: list[str]) -> None:
    changes = {key: value.format(wrong) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError) as caught:
        opened(source if "://" in source else wrong / source, **changes)
    for word in words:
        assert word.format(wrong) in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("kind", "settings"), [
    ("digits", {"subset": "x"}), ("npz", {"split": "test"}), ("folder", {"image_column": "pixels"}),
    ("npz", {"label_column": "kind"}), ("tar", {"image_column": "pixels"}), ("parquet", {"split": "test"}),
])
def test_settings_of_other_sources_are_refused(tmp_path: Path, kind: str, settings: dict[str, str]) -> None:
    source = tmp_path / {"npz": "a.npz", "tar": "a.tar", "parquet": "a.parquet"}.get(kind, "images")
    if kind == "npz":
        np.savez(source, images=np.arange(144, dtype=np.uint8).reshape(9, 4, 4), labels=np.arange(9) % 3)
    elif kind == "folder":
        for number in range(9):
            (source / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
            (source / CLASSES[number % 3] / f"{number}.png").write_bytes(png(number))
    elif kind == "tar":
        write_tar(source, range(9), lambda number: ("cls", b"0"))
    elif kind == "parquet":
        write_parquet(source, range(9))
    (name, value), = settings.items()
    location = "digits" if kind == "digits" else source
    with pytest.raises(UserError, match=f"data.{name}: {value} has no effect with data.source {location}, which .*leave it"):
        opened(location, **settings)
    opened(location, **{name: getattr(ImageDataSettings, name)})
