"""Images in the arrays of a .npz file. What an array asks for is read in its header before the rest of it."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genscale.data.images.decoding import Range, as_bytes
from genscale.data.images.labels import Classes, classes_of, label_of, numbered
from genscale.data.images.ranges import Values, range_of
from genscale.data.images.sets import ArraySet
from genscale.data.images.spec import ImageSpec
from genscale.errors import UserError, nearest
from genscale.reading import Unreadable, read_json

CLASSES_FILE = "classes.json"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
AT_ONCE = 2**26
"""Bytes of numbers that are made into grey levels at a time."""


class Header(NamedTuple):
    """What a .npy file says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def arrays(spec: ImageSpec, path: Path, classes: list[str] | None) -> ArraySet:
    """A .npz file with `images` and perhaps `labels`; names of the classes may stand in a classes.json beside it.

    Raises:
        UserError: it cannot be read, or its arrays are too large or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = [member.removesuffix(".npy") for member in file.namelist()]
            if "images" not in names:
                raise UserError(f"{spec.where}: {path.name} holds the arrays {', '.join(names)}{nearest('images', names)}; "
                                "call the one with the pixels images")
            images = _array(file, "images", spec, path, _check_images)
            given = _array(file, "labels", spec, path, _check_labels) if spec.label and "labels" in names else None
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, MemoryError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{spec.where}: {path.name} cannot be read ({type(error).__name__}: {error}); mend it") from None
    images = _grey_levels(images, spec, path)
    if not spec.label:
        return ArraySet(images, None, None, path.name)
    if given is None:
        raise UserError(f"data.labels=true: not all images of {spec.where} have a label: {path.name} has no array labels; add "
                        "it, or set data.labels to false")
    if given.shape != images.shape[:1]:
        raise UserError(f"{spec.where}: the array labels of {path.name} is {given.dtype} {given.shape}; it must hold one for "
                        f"each of the {len(images)} images")
    labels, bearers = [label_of(label) for label in given.tolist()], [f"{path.name}[{i}]" for i in range(len(given))]
    beside = classes or _beside(path)
    known = Classes(beside, spec.where) if beside else classes_of(labels, bearers, spec.where)
    return ArraySet(images, numbered(labels, bearers, known), known.names, path.name)


def _array(file: zipfile.ZipFile, name: str, spec: ImageSpec, path: Path, check: Callable[[Header], str | None]) -> np.ndarray:
    """An array, once its header is found to be that of one. Raises UserError, and whatever a damaged file raises."""
    member = file.getinfo(f"{name}.npy")
    with file.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        if version not in HEADERS:
            raise ValueError(f"version {version} of the .npy format")
        shape, _, dtype = HEADERS[version](opened)
        header, start = Header(shape, dtype), opened.tell()
    where = f"{spec.where}: the array {name} of {path.name} is {header}"
    if reason := check(header):
        raise UserError(f"{where}; {reason}")
    if header.bytes > spec.max_array_bytes:
        raise UserError(f"{where}, which takes {header.bytes:,} bytes and is too large; give a smaller one, a folder of "
                        f"images, or set data.max_array_bytes above {spec.max_array_bytes:,}")
    if start + header.bytes != member.file_size:
        raise ValueError(f"{name} is {header}, for which {member.file_size:,} bytes are not the right number")
    with file.open(member) as opened:
        return np.lib.format.read_array(opened, allow_pickle=False)


def _check_images(header: Header) -> str | None:
    """What is wrong with it."""
    pixels = len(header.shape) == 3 or (len(header.shape) == 4 and header.shape[3] in (1, 3, 4))
    if header.dtype.kind not in "buif" or not pixels or not header.bytes:
        return "it must hold numbers, (images, height, width) or (images, height, width, 1, 3 or 4)"
    return None


def _check_labels(header: Header) -> str | None:
    if len(header.shape) != 1 or header.dtype.kind not in "buifUS":
        return "it must hold whole numbers or texts, one for each image"
    return None


def _grey_levels(images: np.ndarray, spec: ImageSpec, path: Path) -> np.ndarray:
    """The images as uint8."""
    if images.dtype == np.uint8 and spec.value_range is None:
        return images
    if images.dtype.kind == "f" and not (np.isfinite(images.min()) and np.isfinite(images.max())):
        raise UserError(f"{spec.where}: the array images of {path.name} is {images.dtype} and holds values that are no "
                        "numbers; replace them")
    if images.dtype == bool:
        images, range_ = images.view(np.uint8), Range(0, 1)
    elif spec.value_range is not None:
        range_ = Range(*spec.value_range)
    else:
        range_ = range_of(Values(images.min().item(), images.max().item()), f"{images.dtype} in {path.name}", spec.where)
    found = np.empty(images.shape, np.uint8)
    step = max(1, AT_ONCE // (4 * images[0].size))
    for start in range(0, len(images), step):
        found[start : start + step] = as_bytes(images[start : start + step], range_)
    return found


def _beside(path: Path) -> list[str] | None:
    """Names of classes in a file beside the arrays."""
    try:
        names = read_json(path.parent / CLASSES_FILE)
    except (OSError, Unreadable):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
