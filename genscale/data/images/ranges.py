"""Which numbers stand for black and white in pictures that hold more than 8 bits: 16 bits, whole numbers, floats.

Few files say it, so it is read off the values, once for a source: by picture, dark ones would turn out as bright as others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from genscale.data.images.decoding import DamagedImage, Picture, Range, decode, deep_pixels, scaled
from genscale.errors import UserError

log = logging.getLogger("genscale")
WHITES = (1, 255, 1023, 4095, 16383, 65535)
"""What white can be: floats and masks, 8, 10, 12, 14 and 16 bits."""
LOOKED_AT = 16
"""Images of a source that are looked at."""
BLANK_SIZE = 64
"""Pixels a side at which they are looked at for what is in them at all."""
DARK = 16
"""Of 255: where no picture has more in it, its numbers are hardly what they were taken for."""


class Values(NamedTuple):
    """The least and the largest number in pictures of a kind."""

    least: float
    most: float

    def joined(self, other: Values) -> Values:
        return Values(min(self.least, other.least), max(self.most, other.most))


def range_of(values: Values, kind: str, where: str) -> Range:
    """What is black and what is white in pictures with these values, and a line in the log about it.

    Args:
        kind: what the pictures are, for messages.
        where: the source, as `key=value`, for messages.

    Raises:
        UserError: it cannot be told.
    """
    least, most = values
    if most > WHITES[-1] or (least < 0 and (least < -1 or most > 1)):
        raise UserError(f"data.value_range=None: the pictures of {where} are {kind} and hold values from {least:g} to "
                        f"{most:g}, which do not tell what is black and what is white; set data.value_range to these two, "
                        "as in [0, 255]")
    found = Range(-1, 1) if least < 0 else Range(0, next(white for white in WHITES if most <= white))
    if found.white != WHITES[-1]:
        log.warning("%s: its pictures are %s and hold values up to %g: %d is taken for black, %d for white (data.value_range "
                    "sets others)", where, kind, most, *found)
    return found


def ranges_of(images: Iterable[tuple[str, Callable[[], bytes | np.ndarray]]], picture: Picture, where: str) -> dict[str, Range]:
    """By mode, what is black and white in those of these pictures that have more than 8 bits.

    Args:
        images: (name, what reads it) of some images of a source.
        picture: bounds.

    Raises:
        UserError: it cannot be told.
    """
    found: dict[str, Values] = {}
    for _, raw in images:
        try:
            deep = deep_pixels(raw(), picture)
        except DamagedImage:  # which is said where it is its turn
            continue
        if deep is not None and np.isfinite(deep.values).all():
            values = Values(float(deep.values.min()), float(max(deep.values.max(), deep.at_least)))
            found[deep.mode] = values.joined(found.get(deep.mode, values))
    return {mode: range_of(values, f"of mode {mode}", where) for mode, values in found.items()}


def warn_of_blank(images: Iterable[tuple[str, Callable[[], bytes | np.ndarray]]], picture: Picture, where: str) -> None:
    """A line in the log where all of these pictures come out as one colour each, or next to black, or the range that is set
    has no effect on them."""
    seen, bytes_alone, picture = [], True, replace(picture, size=min(picture.size, BLANK_SIZE))
    for _, raw in images:
        try:
            content = raw()
            pixels = scaled(decode(content, picture), picture)
            bytes_alone &= not isinstance(content, np.ndarray) and deep_pixels(content, picture) is None
        except DamagedImage:
            continue
        seen.append((int(pixels.max()) - int(pixels.min()), int(pixels.max())))
    if seen and bytes_alone and picture.value_range:
        log.warning("%s: data.value_range=%s has no effect: none of the %d pictures looked at is read with more than 8 bits "
                    "(in colour none is); leave it out", where, list(picture.value_range), len(seen))
    advice = ", which must use the whole range from 0 to 255" if bytes_alone else ", and at data.value_range"
    if seen and all(spread <= 1 for spread, _ in seen):
        log.warning("%s: every one of the %d pictures looked at is of one colour alone; look at the files%s", where, len(seen),
                    advice)
    elif seen and all(most <= DARK for _, most in seen):
        log.warning("%s: the %d pictures looked at are next to black, with no value above %d of 255; look at the files%s",
                    where, len(seen), max(most for _, most in seen), advice)
