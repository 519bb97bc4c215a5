"""Many images as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from genscale.models.lettering import Pen

LEAST_TILE = 32
MARGIN = 2
PAPER = 255
INK = 40
WIDEST_NAME = 120
"""Pixels for the name of a row; a longer one takes several lines."""


def grid(images: Tensor | np.ndarray, columns: int | None = None, labels: Sequence[str] | None = None,
         scale: int | None = None, rows: Sequence[str] | None = None) -> np.ndarray:
    """The images side by side on white, row by row.

    Args:
        images: `(n, channels, height, width)` with 1 or 3 channels; in [0, 1], or uint8.
        columns: images in a row (default: as square as can be).
        labels: one text an image, drawn above it where it is not empty, on as many lines as its tile is too narrow for; a row
            without any takes no room for them.
        scale: every pixel becomes a square of this side (default: the least that makes tiles of 32 pixels).
        rows: one text a row, drawn on its left.

    Returns:
        uint8 `(height, width, 3)`.
    """
    pixels = _as_uint8(images)
    n, height, width, _ = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    scale = scale or tile_scale(height, width)
    height, width = height * scale, width * scale
    labels, rows = list(labels or [""] * n), list(rows or [""] * math.ceil(n / columns))
    pen = Pen(max(9, min(16, height // 5)), [*labels, *rows])
    names = [pen.wrapped(text, WIDEST_NAME) for text in rows]
    left = MARGIN + max((pen.width(line) + 2 * MARGIN for name in names for line in name), default=0)
    wrapped = {text: pen.wrapped(text, width - 1) for text in dict.fromkeys(labels)}  # a pixel keeps neighbours apart
    lines = [len(wrapped[text]) for text in labels]
    captions = [pen.line * max(lines[first : first + columns]) for first in range(0, n, columns)]
    heights = [max(caption + height, pen.line * len(name)) for caption, name in zip(captions, names, strict=True)]
    tops = np.cumsum([MARGIN] + [row + MARGIN for row in heights]).tolist()
    sheet = Image.new("RGB", (left + columns * (width + MARGIN), tops[-1]), (PAPER,) * 3)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = tops[row] + captions[row] + max(0, height - pen.line * len(name)) // 2
        pen.write(draw, MARGIN, min(middle, tops[row + 1] - MARGIN - pen.line * len(name)), name, INK)
    for i, tile in enumerate(pixels):
        row, x = i // columns, left + i % columns * (width + MARGIN)
        bottom = tops[row] + captions[row]
        pen.write(draw, x, bottom - pen.line * len(wrapped[labels[i]]), wrapped[labels[i]], INK)
        sheet.paste(Image.fromarray(tile.repeat(scale, axis=0).repeat(scale, axis=1)), (x, bottom))
    return np.asarray(sheet)


def grid_of_rows(parts: Mapping[str, Tensor], columns: int = 8) -> np.ndarray:
    """The images of each part on rows of their own, which its name stands beside: `{"input": images, "output": images}`.

    Args:
        parts: `(n, channels, height, width)` each, in [0, 1]; n may differ.
        columns: images in a row; a row that is not full ends in white.

    Returns:
        uint8 `(height, width, 3)`.
    """
    rows, names = [], []
    for name, images in parts.items():
        images = images.float().cpu()
        rows.append(torch.cat([images, images.new_ones(-len(images) % columns, *images.shape[1:])]))
        names += [name] * (len(rows[-1]) // columns)
    return grid(torch.cat(rows), columns, rows=names)


def tile_scale(height: int, width: int) -> int:
    """How much images of so many pixels are enlarged where nobody says."""
    return max(1, math.ceil(LEAST_TILE / min(height, width)))


def _as_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """`(n, channels, height, width)` as uint8 `(n, height, width, 3)`."""
    if isinstance(images, Tensor):
        images = (images.float() if images.is_floating_point() else images).detach().cpu().numpy()  # NumPy has no bfloat16
    values = np.asarray(images)
    if values.dtype != np.uint8:
        values = (np.nan_to_num(values, nan=0.0).clip(0, 1) * 255).round().astype(np.uint8)
    values = values.transpose(0, 2, 3, 1)
    return values.repeat(3, axis=-1) if values.shape[-1] == 1 else values
