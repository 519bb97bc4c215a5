"""Images by number: sets of which every image can be read at any time."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.images.settings import IMAGE_BYTES
from genscale.errors import UserError, as_utf8

HASHED_BYTES = 2 * 2**30
"""Files of more bytes in all are told apart by name and size, not by content: reading them all would hold up the start."""


def content_hash(content: bytes | np.ndarray) -> int:
    """64 bits of an image's file or pixels. An image is held out where this is below a share of 2**64."""
    read = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
    return int.from_bytes(hashlib.blake2b(read, digest_size=8).digest(), "little")


class ImageSet(ABC):
    """Images by number.

    Attributes:
        labels: `(images,)` int64 numbers of classes, or None.
        classes: names of the classes by number; None where there are no labels.
        places: of the files that they are in: see `folders.identity`.
    """

    places: Sequence[Any] | np.ndarray = ()
    labels: np.ndarray | None = None
    classes: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """An image's file, or its pixels `(height, width[, channels])`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call it in messages."""

    def hashes(self) -> np.ndarray:
        """`(images,)` uint64, of the contents."""
        return np.fromiter((content_hash(self.read(i)) for i in range(len(self))), np.uint64, len(self))


class ArraySet(ImageSet):
    """Images in one array `(images, height, width[, channels])`, uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str] | None, where: str) -> None:
        self.images, self.labels, self.classes, self._where = images, labels, classes, where

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self._where}[{index}]"


class FileSet(ImageSet):
    """Image files, read when they are asked for.

    Args:
        root, names: the files' paths, below their root.
        sizes: bytes of each.
        where: the source, as `key=value`, for messages.
        limit: bytes of a larger file that are read, and one more.
    """

    def __init__(self, root: Path, names: Sequence[str], sizes: Sequence[int], labels: np.ndarray | None,
                 classes: list[str] | None, where: str, limit: int = IMAGE_BYTES) -> None:
        self._root, self._names, self._sizes, self._where = root, list(names), list(sizes), where
        self.labels, self.classes, self._limit = labels, classes, limit

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        path = self._root / self._names[index]
        try:
            if self._sizes[index] <= self._limit:
                return path.read_bytes()
            with open(path, "rb") as file:
                return file.read(self._limit + 1)
        except OSError as error:  # no damaged image, to be replaced: the same run would have other samples another time
            raise UserError(f"{self._where}: cannot be read ({error}); mend that, and start the run again") from None

    def name(self, index: int) -> str:
        return as_utf8(self._names[index])

    def hashes(self) -> np.ndarray:
        if sum(self._sizes) <= HASHED_BYTES:
            return super().hashes()
        keys = (json.dumps([name, size]).encode() for name, size in zip(self._names, self._sizes, strict=True))
        return np.fromiter(map(content_hash, keys), np.uint64, len(self))


class PackedSet(ImageSet):
    """Image files in one buffer, as read from parquet or tar files.

    Args:
        records: (name, content) of each.
    """

    def __init__(self, records: Sequence[tuple[str, bytes]], labels: np.ndarray | None, classes: list[str] | None) -> None:
        # One buffer: worker processes and the garbage collector need not go through millions of objects.
        lengths = np.fromiter((len(content) for _, content in records), np.int64, len(records))
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._buffer = b"".join(content for _, content in records)
        self._names = [name for name, _ in records]
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return self._buffer[self._starts[index] : self._ends[index]]

    def name(self, index: int) -> str:
        return self._names[index]


def digest(images: ImageSet, hashes: np.ndarray) -> dict[str, Any]:
    """What tells this set from others, as JSON."""
    content = hashlib.sha256(hashes.tobytes())
    if images.labels is not None:
        content.update(images.labels.tobytes())
    return {"images": len(images), "content": content.hexdigest(), "classes": images.classes}
