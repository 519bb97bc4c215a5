"""From the bytes or pixels of an image to the square uint8 array that a network is trained on."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

DRAFT = 2
"""JPEG files are decoded at the smallest of their own scales that is still this many times `size`."""
LONGEST = 8
"""A random crop is taken from at most so many squares in a row."""


class DamagedImage(Exception):
    """What a decoder stumbled over."""


@dataclass(frozen=True)
class Picture:
    """How images are brought to one shape; see `ImageDataSettings`."""

    size: int
    channels: int
    crop: str = "center"
    flip: bool = False

    @property
    def draws(self) -> int:
        """Uniform numbers that a training image needs: where to cut it, and whether to mirror it."""
        return 3 if self.crop == "random" or self.flip else 0


def decode(raw: bytes | np.ndarray, picture: Picture) -> Image.Image:
    """An image in mode L or RGB: of a file's content, or of pixels `(height, width[, 1 | 3 | 4])` uint8.

    Raises:
        DamagedImage: these bytes are no whole image.
    """
    try:
        if isinstance(raw, np.ndarray):
            return _plain(Image.fromarray(raw[:, :, 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw), picture.channels)
        image = Image.open(io.BytesIO(raw))
        image.draft(None, (DRAFT * picture.size, DRAFT * picture.size))
        return _plain(ImageOps.exif_transpose(image), picture.channels)
    except Exception as error:  # each format has exceptions of its own: SyntaxError, struct.error, zlib.error, ...
        raise DamagedImage(f"{type(error).__name__}: {error}") from None


def _plain(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits, which `convert` would cut off at 255
        return _plain(Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8)), channels)
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
        shape = tuple(max(picture.size, round(part * picture.size / side)) for part in taken)
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
