"""From the bytes or pixels of an image to the square uint8 array that a network is trained on."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genscale.data.images.settings import IMAGE_BYTES, IMAGE_PIXELS

DRAFT = 2
"""JPEG files are decoded at the smallest of their own scales that is still this many times `size`."""
LONGEST = 8
"""A random crop is taken from at most so many squares in a row."""
DRAWN_BY_OTHERS = ("EPS",)
"""Formats for which Pillow starts another program (Ghostscript), whatever a file is called."""
FULL = {"JPEG2000": 65535, "PPM": 65535}
"""Formats whose values Pillow brings to 16 bits itself."""
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `TooLarge` says it


class DamagedImage(Exception):
    """What a decoder stumbled over."""

    kind = "damaged"


class TooLarge(DamagedImage):
    """More pixels or bytes than data.max_image_pixels and data.max_image_bytes allow."""

    kind = "too large"


class OutOfRange(DamagedImage):
    """Values that are no shades between the black and the white of its source."""

    kind = "out of range"


class Range(NamedTuple):
    """Which numbers are black and white."""

    black: float
    white: float


FULL_RANGE = Range(0, 65535)
"""The range of 16 bits."""


@dataclass(frozen=True)
class Picture:
    """How images are brought to one shape; see `ImageDataSettings`.

    Attributes:
        ranges: what is black and white in pictures of more than 8 bits, by mode, where `value_range` does not say it.
    """

    size: int
    channels: int
    crop: str = "center"
    flip: bool = False
    max_pixels: int = IMAGE_PIXELS
    max_bytes: int = IMAGE_BYTES
    value_range: Range | None = None
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def draws(self) -> int:
        """Uniform numbers that a training image needs: where to cut it, and whether to mirror it."""
        return 3 if self.crop == "random" or self.flip else 0


class Deep(NamedTuple):
    """The numbers in a picture of more than 8 bits, `(height, width)`; white (black where `inverted`) is `at_least` so much."""

    mode: str
    values: np.ndarray
    at_least: int
    inverted: bool


def decode(raw: bytes | np.ndarray, picture: Picture) -> Image.Image:
    """An image in mode L or RGB: of a file's content, or of pixels `(height, width[, 1 | 3 | 4])` uint8.

    Of several frames it is the first. It is turned as its EXIF orientation says.

    Raises:
        DamagedImage: these bytes are no whole image, or one that cannot be used.
    """
    if isinstance(raw, np.ndarray):
        return _plain(Image.fromarray(raw[:, :, 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw), picture.channels)
    image = _opened(raw, picture)
    try:
        if _is_deep(image):
            return _plain(Image.fromarray(_shades(_deep(image), picture)), picture.channels)
        image.draft(None, (DRAFT * picture.size, DRAFT * picture.size))
        return _plain(ImageOps.exif_transpose(image), picture.channels)
    except DamagedImage:
        raise
    except Exception as error:  # each format has exceptions of its own: SyntaxError, struct.error, zlib.error, ...
        raise _what_failed(error, picture) from None


def deep_pixels(raw: bytes | np.ndarray, picture: Picture) -> Deep | None:
    """The numbers in a picture of more than 8 bits; None of another. Raises DamagedImage as `decode` does."""
    if isinstance(raw, np.ndarray) or not _is_deep(image := _opened(raw, picture)):
        return None
    try:
        return _deep(image)
    except Exception as error:
        raise _what_failed(error, picture) from None


def as_bytes(values: np.ndarray, range_: Range) -> np.ndarray:
    """Numbers as grey levels, uint8: black and what is below as 0, white and what is above as 255."""
    shades = values.astype(np.float32)
    shades -= range_.black
    shades *= 255 / (range_.white - range_.black)
    shades += 0.5
    return shades.clip(0, 255, out=shades).astype(np.uint8)


def _opened(raw: bytes, picture: Picture) -> Image.Image:
    """The image of a file, of which only the header has been read. Raises DamagedImage."""
    if len(raw) > picture.max_bytes:
        raise TooLarge(f"more than data.max_image_bytes={picture.max_bytes:,}")
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, picture.max_pixels)  # Pillow itself refuses twice as many
    try:
        image = Image.open(io.BytesIO(raw))
    except UnidentifiedImageError:
        raise DamagedImage("no image of a format that is read" if raw else "an empty file") from None
    except Exception as error:
        raise _what_failed(error, picture) from None
    if image.format in DRAWN_BY_OTHERS:
        raise DamagedImage(f"{image.format} files are not read")
    width, height = image.size
    if width * height > picture.max_pixels:
        raise TooLarge(f"{width:,} x {height:,} pixels, and data.max_image_pixels={picture.max_pixels:,}")
    return image


def _what_failed(error: Exception, picture: Picture) -> DamagedImage:
    if isinstance(error, Image.DecompressionBombError):
        return TooLarge(f"{error}; data.max_image_pixels={picture.max_pixels:,}")
    if "too large for PngImagePlugin" in str(error):
        return TooLarge("of its text or colour profile more is packed than Pillow takes")
    return DamagedImage(re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "the file", f"{type(error).__name__}: {error}"))


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _deep(image: Image.Image) -> Deep:
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(ImageOps.exif_transpose(image))
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    at_least = 4095 if 12 in tags.get(BITS_PER_SAMPLE, ()) else FULL.get(image.format or "", 0)
    return Deep(mode, values, at_least, tags.get(PHOTOMETRIC) == 0)  # which Pillow heeds up to 8 bits


def _shades(deep: Deep, picture: Picture) -> np.ndarray:
    """uint8 grey levels. Raises OutOfRange for values that are no such."""
    if not np.isfinite(deep.values).all():
        raise OutOfRange("it holds values that are no numbers")
    range_ = picture.value_range or picture.ranges.get(deep.mode) or (FULL_RANGE if deep.mode == "I;16" else None)
    if range_ is None:
        raise OutOfRange(f"of mode {deep.mode}, as no picture was that was looked at first; set data.value_range")
    least, most = deep.values.min(), deep.values.max()
    if picture.value_range is None and (least < range_.black or most > range_.white):
        raise OutOfRange(f"values from {least:g} to {most:g}, where {range_.black:g} is black and {range_.white:g} white; set "
                         "data.value_range")
    shades = as_bytes(deep.values, range_)
    return 255 - shades if deep.inverted else shades


def _plain(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "LAB":  # its A is no alpha
        image = image.convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def scaled(image: Image.Image, picture: Picture) -> np.ndarray:
    """The part of the image that a square may be cut from, `(height, width[, 3])` uint8; its shorter side is `size`.

    Shrunk with Lanczos's filter, enlarged bilinearly. Cut and scaled in one step, and of a long image only the middle, so that
    none takes much memory.
    """
    width, height = image.size
    side = min(width, height)
    longest = {"none": max(width, height), "center": side, "random": LONGEST * side}[picture.crop]
    taken = min(width, longest), min(height, longest)
    left, top = ((whole - part) / 2 for whole, part in zip(image.size, taken, strict=True))
    shape = (picture.size, picture.size)
    if picture.crop == "random":
        wide, high = (max(picture.size, round(part * picture.size / side)) for part in taken)
        shape = wide, high
    if image.size != shape or taken != image.size:
        filter_ = Image.Resampling.LANCZOS if side > picture.size else Image.Resampling.BILINEAR
        image = image.resize(shape, filter_, box=(left, top, left + taken[0], top + taken[1]))
    return np.array(image)


def square(pixels: np.ndarray, picture: Picture, draws: np.ndarray | None = None) -> np.ndarray:
    """What `scaled` gave, as the network is fed with it: `(channels, size, size)` uint8.

    Args:
        draws: `(3,)` in [0, 1): where a random crop lies from left to right and from top to bottom, and whether to mirror
            (below 1/2); None: in the middle, not mirrored.
    """
    size = picture.size
    across, down = (0.5, 0.5) if draws is None else draws[:2].tolist()
    left, top = int(across * (pixels.shape[1] - size + 1)), int(down * (pixels.shape[0] - size + 1))
    pixels = pixels[top : top + size, left : left + size]
    if picture.flip and draws is not None and draws[2] < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
