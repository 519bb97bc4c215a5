"""One walk for text and images: links once, what is hidden or no file never, and a line that says what was left out."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genscale.data.folders import divided
from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.shards import image_endings
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError, as_utf8

CASES = Path(__file__).parents[3] / "shared" / "cases"


def write(file: Path, number: int) -> None:
    """A document or a picture that is its number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".txt":
        file.write_text(f"document {number}, {'long ' * 40}\n")
    else:
        Image.new("L", (4, 4), number).save(file, "PNG")


def numbers(kind: str, source: object, **settings: Any) -> tuple[list[int], list[int]]:
    """What is trained and what is validated on, sorted."""
    if kind == "txt":
        data = TextData(TextDataSettings(source=source if isinstance(source, list) else str(source), lanes=1, document="file",
                                         sequence_length=64, **settings), seed=1)
        tokens = np.concatenate([sample["tokens"][:-1] for sample in data.validation()])
        sides = ["".join(data.streams[0].source.documents()), bytes(tokens[(tokens >= 0) & (tokens < 256)].tolist()).decode()]
        return tuple(sorted(int(part.split(",")[0]) for part in side.split("document ")[1:]) for side in sides)
    data = images(source, **settings)
    epoch = (sample for sample, _ in islice(data.open_lane(0), data.order.count))
    return tuple(sorted(int(sample["image"][0, 0, 0]) for sample in side) for side in (epoch, data.validation()))


def images(source: object, **settings: Any) -> ImageData:
    settings = {"size": 4, "channels": 1, "lanes": 1, "validation_fraction": 0.2, **settings}
    return ImageData(ImageDataSettings(source=source if isinstance(source, list) else str(source), **settings), seed=1)


@pytest.fixture(params=["txt", "png"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def tangle(root: Path, kind: str) -> None:
    """Twelve files in a and b and one through a link, beside all that must not be read."""
    for number in range(12):
        write(root / "ab"[number % 2] / f"{number}.{kind}", number)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "a/.git"):
        write(root / hidden / f"hidden.{kind}", 50)
    write(root / "b" / f"._1.{kind}", 51)
    write(root.parent / "elsewhere" / f"12.{kind}", 12)
    (root / "c").symlink_to("../elsewhere")
    (root / "a" / "again").symlink_to("../../elsewhere")
    (root / "a" / "back").symlink_to("..")
    (root / "b" / "up").symlink_to("../../..")
    (root / "a" / f"same.{kind}").symlink_to(f"0.{kind}")
    (root / "a" / f"gone.{kind}").symlink_to("nowhere")
    (root / "b" / f"loop.{kind}").symlink_to(f"loop.{kind}")
    os.mkfifo(root / f"pipe.{kind}")
    (root / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(root)  # a socket's path is short
        bound.bind(f"socket.{kind}")
        os.chdir(here)
    (root / "README.md").write_text("no data")
    (root / "Thumbs.db").write_text("no data")


def test_every_file_once_and_one_line_for_the_rest(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tangle(tmp_path / "root", kind)
    with caplog.at_level(logging.INFO):
        trained, held = numbers(kind, tmp_path / "root")
    assert sorted(trained + held) == list(range(13))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "genscale.data.folders"]
    assert line == (
        f"data.source={tmp_path}/root: left out 2 dangling links (a/gone.{kind}, b/loop.{kind}), 4 links to what is read "
        f"already (a/again, a/back, a/same.{kind}, ...), 3 pipes, sockets or devices (device, pipe.{kind}, socket.{kind}), "
        f"4 hidden files or folders (.ipynb_checkpoints, __MACOSX, a/.git, ...), 1 file of other kinds (.md)")
    shutil.move(tmp_path / "root", tmp_path / ".root")  # which its owner has named
    assert numbers(kind, tmp_path / ".root") == (trained, held)


def test_inspect_says_it_too(tmp_path: Path, kind: str, genscale: Callable) -> None:
    tangle(tmp_path / "root", kind)
    settings = ["--data.lanes", 1] if kind == "txt" else ["--model.family", "vae", "--data.labels", "true"]
    done = genscale("data", "inspect", "--data.source", tmp_path / "root", *settings)
    assert done.code == 0 and done.err.count("left out 2 dangling links") == 1, done.err


def test_a_folder_of_nothing_but_what_is_left_out(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"gone.{kind}").symlink_to("nowhere")
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(UserError, match=rf"left out 1 dangling link \(gone.{kind}\), 1 file of other kinds \(.md\)"):
        numbers(kind, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_counted(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.txt", number)
        (tmp_path / f"{number}.txt").chmod(0)
    with pytest.raises(UserError, match=r"cannot be read \(.*0.txt' and 2 more\); mend its permissions"):
        numbers("txt", tmp_path)


@pytest.mark.parametrize("source", ["pipe", "/dev/zero", "/dev/null", "link"])
def test_a_source_that_is_no_file_is_not_opened(tmp_path: Path, kind: str, source: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(UserError, match=r"is a (named pipe|device), which can be read but once.*write its content to a file"):
        numbers(kind, tmp_path / source)


def test_names_that_are_no_utf8(tmp_path: Path, genscale: Callable) -> None:
    root = os.fsencode(tmp_path)
    for folder in (b"caf\xe9", b"b"):
        os.makedirs(root + b"/images/" + folder)
        for number in range(5):
            with open(root + b"/images/" + folder + b"/p\xe9%d.png" % number, "wb") as file:
                Image.new("L", (4, 4), number).save(file, "PNG")
    data = images(tmp_path / "images", labels=True)
    assert data.classes == ["b", "caf\\xe9"] and [as_utf8(name) for name in data.classes] == data.classes
    assert {data.order._images.name(i) for i in range(10)} == {f"{folder}/p\\xe9{i}.png" for folder in data.classes
                                                              for i in range(5)}
    settings = ["--model.family", "vae", "--data.size", 8, "--data.labels", "true", "--data.lanes", 2, "--train.steps", 1,
                "--train.global_batch_size", 2, "--run.trace", "true", "--run.dir", tmp_path / "runs",
                "--tracking.wandb", "disabled"]
    done = genscale("train", *settings, "--data.source", tmp_path / "images")
    assert done.code == 0 and "Traceback" not in done.err, done.err
    message = genscale("train", *settings, "--data.source", os.fsdecode(root + b"/images/caf\xe9")).message()
    assert f"data.source={tmp_path}/images/caf\\xe9: is no UTF-8" in message and "ln -s" in message


@pytest.mark.parametrize("words", [
    ("data.source", "train", "--data.source", ""), ("data.source", "train", "--data.source", "  "),
    ("data.source", "train", "--model.family", "vae", "--data.source", ""),
    ("data.source", "data", "inspect", "--data.source", ""), ("data.source", "train", "--data.source", '["a.txt", ""]'),
    ("data.sources[0].source", "train", "--data.sources", '[{source: ""}]'),
    ("data.validation_source", "train", "--data.validation_source", ""), ("data.tokenizer", "train", "--data.tokenizer", ""),
    ("data.cache", "train", "--data.cache", ""), ("data.cache", "data", "build", "--data.cache", ""),
    ("model.from", "train", "--model.from", ""), ("run.dir", "train", "--run.dir", ""), ("run.name", "train", "--run.name", ""),
    ("run.resume", "train", "--run.resume", ""), ("RUN", "sample", ""), ("RUN", "evaluate", ""), ("RUN", "export", ""),
    ("run_b", "compare", "runs", ""), ("runs", "sync", ""), ("--out", "tokenizer", "train", "--out", ""),
])
def test_nothing_is_no_path(words: tuple[str, ...], genscale: Callable, tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "1.txt", 1)
    write(tmp_path / "2.png", 2)
    monkeypatch.chdir(tmp_path)
    message = genscale(*words[1:]).message()
    assert message.startswith(words[0]) and "is empty (was the variable that it comes from not set?)" in message
    assert {entry.name for entry in tmp_path.iterdir()} <= {"1.txt", "2.png", "runs"}


# --- training and validation by name ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("names", "training", "validation"), [
    ("train test", "train", "test"), ("train test annotations", "train", "test"), ("Train VAL", "Train", "VAL"),
    ("training dev unlabelled", "training", "dev"), ("train val test", "train", "val"),
    ("train2017 val2017", "train2017", "val2017"),
    ("training_set test_set", "training_set", "test_set"), ("train_station test_tube bus", "", ""), ("train car bus", "", ""),
    ("train-0.jsonl train-1.jsonl.gz test.jsonl", "train-0.jsonl train-1.jsonl.gz", "test.jsonl"), ("trainer tester", "", ""),
])
def test_first_words(names: str, training: str, validation: str) -> None:
    assert divided(names.split()) == (training.split(), validation.split())


@pytest.mark.parametrize("folders", ["train test", "Train TEST docs", "data/training data/validation", "train val .git"])
def test_a_test_set_is_held_out_whatever_else_is_there(tmp_path: Path, kind: str, folders: str,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    first, second, *others = folders.split()
    for number in range(8):
        write(tmp_path / first / "x" / f"{number}.{kind}", number)
        write(tmp_path / second / "x" / f"{number + 20}.{kind}", number + 20)
        for other in others:
            write(tmp_path / other / f"{number + 40}.{kind}", number + 40)
    assert numbers(kind, tmp_path) == (list(range(8)), list(range(20, 28)))
    said = [line for record in caplog.records if record.levelno == logging.WARNING
            if "of one colour" not in (line := record.getMessage())]  # as these pictures are
    assert [line for line in said if "what else is there is not read (docs)" in line] == said * ("docs" in folders)
    aside = numbers(kind, tmp_path / first, validation_source=str(tmp_path))  # a source has its own test set
    assert aside == (list(range(8)), list(range(20, 28)))


@pytest.mark.parametrize("folders", ["bottle/train bottle/test cable/train cable/test", "images/train images/val masks/train"])
def test_a_test_set_in_each_folder_is_not_clear(tmp_path: Path, folders: str) -> None:
    for number, folder in enumerate(folders.split()):
        write(tmp_path / folder / "x" / f"{number}.png", number)
    with pytest.raises(UserError, match=r"its folder (bottle|images) has folders train and (test|val) of its own, .*give .*/"):
        images(tmp_path)


def test_a_test_file_is_held_out_of_text(tmp_path: Path) -> None:
    for number, name in enumerate(["train-00000.txt", "train-00001.txt", "test-00000.txt"]):
        write(tmp_path / "data" / name, number)
    assert numbers("txt", tmp_path) == ([0, 1], [2])
    assert numbers("txt", [str(tmp_path / "data" / "train-00000.txt"), str(tmp_path)]) == ([0, 0, 1], [2])


def test_a_class_called_train_is_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(30):
        write(tmp_path / ["train", "car", "bus"][number % 3] / f"{number}.png", number)
    assert images(tmp_path, labels=True).classes == ["bus", "car", "train"]
    assert "its folder train is read like those beside it (bus, car); if it is a part of the set, give" in caplog.text
    write(tmp_path / "train" / "x" / "31.png", 31)
    with pytest.raises(UserError, match=r"its folder train has folders of its own and lies beside bus, car: .*give .*/train"):
        images(tmp_path)


def test_tars_beside_a_test_set_are_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, name in enumerate(["0.tar", "1.tar", "test.tar"]):
        with tarfile.open(tmp_path / name, "w") as archive:
            for number in range(10 * part, 10 * part + 10):
                write(tmp_path / ".pictures" / f"{number}.png", number)
                archive.add(tmp_path / ".pictures" / f"{number}.png", f"{number}.png")
    assert numbers("png", tmp_path) == (list(range(20)), list(range(20, 30)))


# --- what is meant ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("other", ["originals.tar", "b/labels.parquet", "train.npz"])
def test_images_beside_an_archive_are_ambiguous(tmp_path: Path, other: str) -> None:
    for number in range(5):
        write(tmp_path / "b" / f"{number}.png", number)
    (tmp_path / other).write_bytes(b"whatever")
    with pytest.raises(UserError) as caught:
        images(tmp_path)
    assert f"holds 5 images (b/0.png, b/1.png, b/2.png, ...) and 1 file ({other})" in str(caught.value)
    assert f"give {tmp_path}/{other}, or a folder" in str(caught.value)


@pytest.mark.parametrize(("ending", "form"), [(".jfif", "JPEG"), (".avif", "AVIF"), (".webp", "WEBP"), (".TIF", "TIFF"),
                                              (".Jpg", "JPEG"), (".tga", "TGA"), (".jp2", "JPEG2000"), (".qoi", "QOI")])
def test_every_picture_that_pillow_reads(tmp_path: Path, ending: str, form: str) -> None:
    for number in range(6):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}{ending}", form)
    (tmp_path / "page.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    data = images(tmp_path, size=16, channels=3)
    assert data.order.count + len(data.validation()) == 6 and data.order.reader.bad == 0


def test_endings_are_pillows() -> None:
    assert {".png", ".jpg", ".jpeg", ".jfif", ".avif", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm"} < set(image_endings())
    assert not {".pdf", ".eps", ".ps", ".wmf", ".mpg", ".h5"} & set(image_endings())


def test_lists(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        write(tmp_path / "ab"[number % 2] / f"{number}.{kind}", number)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    if kind == "png":
        with pytest.raises(UserError, match=r"data.source: .*/a is a folder, and folders of images cannot be listed; give one"):
            images(folders)
        return
    trained, held = numbers(kind, folders)
    assert sorted(trained + held) == list(range(8))
    (tmp_path / "c").symlink_to("a")
    numbers(kind, [*folders, str(tmp_path / "c")])
    assert f"data.source: {tmp_path}/c is listed twice (as {tmp_path}/a) and is read twice" in caplog.text


@pytest.mark.parametrize("validation", ["root", "link", "root/a", "root/a/0.txt"])
def test_a_validation_set_that_is_trained_on_is_warned_of(tmp_path: Path, kind: str, validation: str,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        write(tmp_path / "root" / "ab"[number % 2] / f"{number}.{kind}", number)
        write(tmp_path / "other" / f"{number}.{kind}", number + 20)
    (tmp_path / "link").symlink_to("root")
    numbers(kind, tmp_path / "root", validation_source=str(tmp_path / "other"))
    assert "trained on too" not in caplog.text
    if kind == "txt" or not validation.endswith(".txt"):
        numbers(kind, tmp_path / "root", validation_source=str(tmp_path / validation))
        assert f"data.validation_source={tmp_path}/{validation}: all of it is trained on too" in caplog.text


def test_copies_in_the_validation_set_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        write(tmp_path / "train" / f"{number}.png", number)
        write(tmp_path / "val" / f"copy{number}.png", number if number < 6 else number + 20)
        write(tmp_path / "other" / f"{number}.png", number + 4)
    images(tmp_path)
    assert "validation set: 6 of its 8 images are trained on too" in caplog.text
    caplog.clear()
    images(tmp_path / "train", validation_source=str(tmp_path / "other"))
    assert "trained on too" not in caplog.text  # a few are in many sets


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases lie beside the repository where it is built")
@pytest.mark.parametrize(("case", "classes", "said"), [
    ("hidden", ["a", "b"], "left out"), ("split_extra", ["a", "b"], "test held out for validation"),
    ("images_and_tar", None, "originals.tar) beside each other"),
])
def test_cases(case: str, classes: list[str] | None, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        if classes is None:
            with pytest.raises(UserError, match="images_and_tar: holds 40 images") as caught:
                images(CASES / "images" / case, labels=True)
            assert said in str(caught.value)
        else:
            data = images(CASES / "images" / case, labels=True)
            assert data.classes == classes and data.order.count + len(data.validation()) in (40, 80) and said in caplog.text
