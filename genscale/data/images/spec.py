"""Which images a source is, how it is read, and what a read image is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from PIL import Image

from genscale.data.images.labels import Label
from genscale.data.images.settings import ARRAY_BYTES, IMAGE_BYTES
from genscale.data.spec import Spec
from genscale.errors import UserError, nearest

NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC"}
"""What Pillow opens though it is no picture, or needs another program to be one."""


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of the pictures that Pillow reads, in lower case. (Asking it loads all its formats.)"""
    Image.init()
    read = {*Image.OPEN, "MPO"} - NO_PICTURES
    return tuple(ending for ending, kind in Image.registered_extensions().items() if kind in read)


class Record(NamedTuple):
    """An image file (empty where there is none), what to call it, and its label as the source has it."""

    name: str
    content: bytes
    label: Label


@dataclass(frozen=True)
class ImageSpec(Spec):
    """A source of images to read.

    Attributes:
        image, label: columns of the images and of their labels; None: labels are not read.
        classes: names of the classes, where they are known.
        renames: the settings give them, so that they may call a table's own classes otherwise.
        max_image_bytes, max_array_bytes, value_range: see `ImageDataSettings`.
    """

    image: str = "image"
    label: str | None = None
    classes: tuple[str, ...] | None = None
    renames: bool = False
    max_image_bytes: int = IMAGE_BYTES
    max_array_bytes: int = ARRAY_BYTES
    value_range: tuple[float, float] | None = None
    local_advice: ClassVar[str] = "give the path of a local file or folder (.npz, .parquet, .tar, images), or digits"

    @property
    def where(self) -> str:
        """The source for messages."""
        return f"{self.key}={self.name}"

    @property
    def content(self) -> dict[str, str]:
        return {"image_column": self.image, **({"label_column": self.label} if self.label else {})}

    def unknown_columns(self, where: str, columns: Sequence[str]) -> UserError | None:
        for setting, column in self.content.items():
            if column not in columns:
                purpose = "images" if setting == "image_column" else "labels (or data.labels to false)"
                return UserError(f"data.{setting}={column}: {where} of {self.where} has the columns {', '.join(columns)}"
                                 f"{nearest(column, columns)}; set data.{setting} to the one that holds the {purpose}")
        return None
