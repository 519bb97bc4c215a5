"""Many images as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEAST_TILE = 32
MARGIN = 2
PAPER = 255
INK = 40


def grid(images: Tensor | np.ndarray, columns: int | None = None, labels: Sequence[str] | None = None,
         scale: int | None = None) -> np.ndarray:
    """The images side by side on white, row by row.

    Args:
        images: `(n, channels, height, width)` with 1 or 3 channels; in [0, 1], or uint8.
        columns: images in a row (default: as square as can be).
        labels: one text an image, drawn above it where it is not empty; a text too long for its tile is cut, and a row without
            any takes no room for them.
        scale: every pixel becomes a square of this side (default: the least that makes tiles of 32 pixels).

    Returns:
        uint8 `(height, width, 3)`.
    """
    pixels = _as_uint8(images)
    n, height, width, _ = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    scale = scale or max(1, math.ceil(LEAST_TILE / min(height, width)))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=max(9, min(16, height // 5)))
    line, labels = math.ceil(font.getbbox("Ag")[3]) + 2, list(labels or [""] * n)
    captions = [line if any(labels[first : first + columns]) else 0 for first in range(0, n, columns)]
    tops = np.cumsum([MARGIN] + [caption + height + MARGIN for caption in captions]).tolist()
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, tops[-1]), (PAPER,) * 3)
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(pixels):
        row, left = i // columns, MARGIN + i % columns * (width + MARGIN)
        if labels[i]:
            draw.text((left, tops[row]), _fitted(labels[i], font, width), fill=(INK,) * 3, font=font)
        sheet.paste(Image.fromarray(tile), (left, tops[row] + captions[row]))
    return np.asarray(sheet)


def _as_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """`(n, channels, height, width)` as uint8 `(n, height, width, 3)`."""
    if isinstance(images, Tensor):
        images = (images.float() if images.is_floating_point() else images).detach().cpu().numpy()  # NumPy has no bfloat16
    values = np.asarray(images)
    if values.dtype != np.uint8:
        values = (np.nan_to_num(values, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    values = values.transpose(0, 2, 3, 1)
    return values.repeat(3, axis=-1) if values.shape[-1] == 1 else values


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
