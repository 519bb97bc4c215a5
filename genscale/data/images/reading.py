"""Decoding with an eye on damage: bad images are counted and named, and end the run where they are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from genscale.data.images.decoding import DamagedImage, Picture, decode, scaled, square
from genscale.data.lanes import Sample
from genscale.errors import UserError

log = logging.getLogger("genscale")
KEPT_BYTES = 512 * 2**20
"""Decoded images are kept up to so many bytes."""
FIRST_JUDGED = 100
"""Images after which the share of bad ones is looked at."""


class ImageReader:
    """Samples out of files or pixels.

    Args:
        picture: what is made of an image.
        source: the source, as `key=value`, for messages.
        bad_share: see `ImageDataSettings`.

    Attributes:
        read, bad: images asked for so far in this process, and how many of them were damaged.
    """

    def __init__(self, picture: Picture, source: str, bad_share: float) -> None:
        self._picture, self._source, self._bad_share = picture, source, bad_share
        self.read = self.bad = 0
        self._named: set[str] = set()
        self._kinds: set[str] = set()
        self._last = ""
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}, "_room": KEPT_BYTES}

    def sample(self, raw: Callable[[], bytes | np.ndarray], name: str, draws: np.ndarray | None,
               keep: int | None = None) -> np.ndarray | None:
        """`(channels, size, size)` uint8; None, and a line in the log, where the image is damaged.

        Args:
            raw: reads the file or the pixels.
            name: what to call it.
            draws: see `square`.
            keep: number to keep it by.
        """
        pixels = None if keep is None else self._kept.get(keep)
        if pixels is None:
            try:
                pixels = scaled(decode(raw(), self._picture), self._picture)
            except DamagedImage as error:
                self._kinds.add(error.kind)
                self._last = f"{name} is {error.kind} ({error})"
                if name not in self._named:
                    self._named.add(name)
                    log.warning("%s: %s; it is passed over", self._source, self._last)
                return None
            if keep is not None and self._room >= pixels.nbytes:
                self._kept[keep] = pixels
                self._room -= pixels.nbytes
        return square(pixels, self._picture, draws)

    def count(self, bad: str | None) -> None:
        """Note that an image was asked for; `bad` is its name where it is damaged.

        Raises:
            UserError: too many of them are.
        """
        self.read += 1
        if bad is None:
            return
        self.bad += 1
        if self.read >= FIRST_JUDGED and self.bad > self._bad_share * self.read:
            raise UserError(f"{self._source}: {self.bad} of {self.read} images read {self._verdict}; mend or remove them, or "
                            f"set data.bad_share above {self.bad / self.read:.3g}")

    def nothing_whole(self) -> UserError:
        """The error where no image is left to take a damaged one's place."""
        return UserError(f"{self._source}: all of its images that were read {self._verdict}; give another")

    @property
    def _verdict(self) -> str:
        return f"{'are damaged' if self._kinds == {'damaged'} else 'cannot be used'}, the last: {self._last}"


def labelled(pixels: np.ndarray, label: int) -> Sample:
    """An image and the number of its class."""
    return {"image": pixels, "label": np.asarray(label, np.int64)}
