"""Samples as files that other tools read: one picture each, or one .npz of all."""

from __future__ import annotations

import shutil
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from genscale.errors import UserError
from genscale.writing import drafted

SHOWN_AFTER_SECONDS = 2.0
COPIED = 2**20
"""Bytes at a time."""
LONGEST_NAME = 200
"""Bytes of a class in the name of a file, of which file systems take 255."""


def picture_of_run(folder: Path, name: str) -> Path:
    """Where a picture lies in a run folder that may be a stranger's. Raises UserError where a link leads out of it."""
    file = folder / "samples" / f"{name}.png"
    if link := next((path for path in (file.parent, file) if path.is_symlink()), None):
        raise UserError(f"--out: {link} is a link, and nothing is written through one; remove it, or give --out a file")
    return file


def empty_folder(folder: Path) -> None:
    """Make the folder that `write_pictures` fills. Raises UserError where it holds something or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--files: {folder} is no folder that can be written ({error.strerror}); give another") from None
    if full:
        raise UserError(f"--files: the folder {folder} is not empty, and samples would mix with what it holds; give a new one")


def write_pictures(folder: Path, batches: Iterable[Tensor], count: int, classes: Sequence[str] | None) -> None:
    """Write image i as `<i>.png`, and where it has a class as `<i>-<class>.png`; i has five digits, or as many as it takes.

    Args:
        batches: uint8 `(batch, channels, height, width)`, `count` images in all.
        classes: name of the class of each image.

    Raises:
        UserError: the disk does not take them.
    """
    digits, number = max(5, len(str(count - 1))), 0
    for images in _shown(batches, count):
        for image in images.permute(0, 2, 3, 1).numpy():
            name = f"{number:0{digits}d}" + (f"-{_file_name(classes[number])}" if classes else "")
            with _said("--files", folder):
                Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{name}.png")
            number += 1


def write_images_npz(file: Path, batches: Iterable[Tensor], shape: tuple[int, int, int, int], classes: Sequence[str] | None,
                     numbers: np.ndarray | None) -> None:
    """Write `images`, uint8 `(n, height, width, channels)`, and `labels`, the name of the class of each, as `data.source` reads
    them; and both as `arr_0` and `arr_1` (numbers of the classes), the names that guided-diffusion's evaluator and what follows
    it expect. One batch at a time is held in memory.

    Args:
        batches: uint8 `(batch, channels, height, width)`.
        shape: `(n, channels, height, width)` of all.
        classes, numbers: name and number of the class of each image, where the run is conditional.

    Raises:
        UserError: the file cannot be written.
    """
    count, channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}
    with _replacing(file) as draft:
        with zipfile.ZipFile(draft, "w") as archive, archive.open("images.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for images in _shown(batches, count):
                array.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)
        with zipfile.ZipFile(draft) as source, zipfile.ZipFile(draft, "a") as archive:
            with source.open("images.npy") as written, archive.open("arr_0.npy", "w", force_zip64=True) as copy:
                shutil.copyfileobj(written, copy, COPIED)
            for name, values in (("labels", classes), ("arr_1", numbers)):
                if values is not None:
                    with archive.open(f"{name}.npy", "w") as array:
                        np.lib.format.write_array(array, np.asarray(values), allow_pickle=False)


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write a picture, uint8 `(height, width, 3)`, in the format that the file's name says.

    Raises:
        UserError: pillow writes no such format, or the file cannot be written.
    """
    with _said("--out", file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
        except ValueError:
            raise UserError(f"--out: {file} has no ending that pillow knows; call it {file.with_suffix('.png').name}") from None


def write_array(file: Path, name: str, values: np.ndarray) -> None:
    """Write one array: as .csv with the columns x, y where the file is called so, else as .npz under its name and as `arr_0`.

    Raises:
        UserError: the file cannot be written.
    """
    with _replacing(file) as draft, open(draft, "wb") as target:
        if file.suffix == ".csv":
            np.savetxt(target, values, "%.9g", ",", header="x,y", comments="")
        else:
            arrays: dict[str, Any] = {name: values, "arr_0": values}
            np.savez(target, **arrays)


@contextmanager
def _said(key: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written ({error.strerror or error}); give another path") from None


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A file beside it, to be written, which takes its place once it is whole."""
    with _said("--out", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with drafted(file) as draft:
            yield draft


def _shown(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The batches, with their progress on a terminal."""
    with tqdm(total=count, desc="images", unit="image", delay=SHOWN_AFTER_SECONDS, disable=None, file=sys.stderr) as bar:
        for images in batches:
            yield images
            bar.update(len(images))


def _file_name(text: str) -> str:
    """A class's name as a part of a file's: other signs than letters, digits, "-", "_" and "." as %XX of their UTF-8."""
    name = ""
    for sign in text:
        plain = sign.isalnum() or unicodedata.category(sign).startswith("M") or sign in "-_."
        sign = sign if plain else "".join(f"%{byte:02X}" for byte in sign.encode("utf-8", "replace"))
        if len((name + sign).encode()) > LONGEST_NAME:
            break
        name += sign
    return name
