"""Samples of several images each, which the discriminator of a packed GAN sees together (Lin et al. 2018, "PacGAN")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from genscale.data.images.settings import PackedImageDataSettings
from genscale.data.lanes import Cursor, Data, Sample
from genscale.errors import SourceLost, UserError
from genscale.rng import permutation

if TYPE_CHECKING:
    from genscale.data.images.order import ShuffledImages
    from genscale.data.images.stream import StreamedImages

D = TypeVar("D", bound=Data)


class ImagesInLanes(Data):
    """Samples of images.

    Attributes:
        classes: names of the classes, or None without labels.
        order: the images to train on, one by one.
    """

    classes: list[str] | None
    order: ShuffledImages | StreamedImages


class PackedData(ImagesInLanes):
    """Each sample is `count` samples of a lane after each other, stacked: so a pack does not depend on processes or
    micro-batches. The validation set is not packed.

    Args:
        data: what to pack; its other attributes (classes, size, ...) are this one's too.
    """

    key = "data.pack"

    def __init__(self, data: Data, count: int) -> None:
        self._data, self._count, self.lane_count = data, count, data.lane_count

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for before __init__, by pickle
            raise AttributeError(name)
        return getattr(self._data, name)

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        pack: list[Sample] = []
        for sample, place in self._data.open_lane(lane, cursor):
            pack.append(sample)
            if len(pack) == self._count:
                yield {key: np.stack([each[key] for each in pack]) for key in sample}, place
                pack = []

    def cursor_at(self, position: int) -> Cursor | None:
        return self._data.cursor_at(position * self._count)

    def samples_of_epoch(self) -> int | None:
        samples = self._data.samples_of_epoch()
        return samples // self._count if samples else None

    def validation(self) -> list[Sample]:
        return self._data.validation()

    def check(self, global_batch_size: int) -> None:
        try:
            self._data.check(global_batch_size * self._count)
        except SourceLost:
            raise
        except UserError as error:
            raise UserError(f"{error} (divided by {self._count}: {self.key} takes {self._count} for each of the "
                            f"{global_batch_size} samples)") from None

    def plan(self) -> dict[str, Any]:
        return {**self._data.plan(), "pack": self._count}

    def close(self) -> None:
        self._data.close()


class StackedData(PackedData):
    """Each sample's image is those of `count` samples of a lane after each other, channel upon channel; so is the validation
    set's. Such an image has no label."""

    key = "data.stack"

    def __init__(self, data: Data, count: int) -> None:
        super().__init__(data, count)
        self.classes = None

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        for sample, place in super().open_lane(lane, cursor):
            yield {"image": np.concatenate(sample["image"])}, place

    def validation(self) -> list[Sample]:
        images = [sample["image"] for sample in self._data.validation()]
        # Each image once in every channel, beside others each time.
        orders = [permutation(len(images), 0, "stack", channel) for channel in range(self._count)]
        return [{"image": np.concatenate([images[i] for i in chosen])} for chosen in zip(*orders, strict=True)]

    def plan(self) -> dict[str, Any]:
        return {**self._data.plan(), "stack": self._count}


def gan_images(data: ImagesInLanes, settings: PackedImageDataSettings) -> ImagesInLanes:
    """The images as `data.stack` and `data.pack` ask for them. Raises UserError for labels or colours of what is stacked."""
    if settings.stack > 1 and settings.labels:
        raise UserError(f"data.labels=true: an image of data.stack {settings.stack} shows as many classes; set data.labels to "
                        "false, or data.stack 1")
    if settings.stack > 1 and settings.channels > 1:
        raise UserError(f"data.stack: {settings.stack} lays greyscale images over each other, and data.channels is "
                        f"{settings.channels}; set data.channels 1")
    stacked = StackedData(data, settings.stack) if settings.stack > 1 else data
    return packed(stacked, settings.pack)


def packed(data: D, count: int) -> D | PackedData:
    """The data in packs of `count`; as it is for 1."""
    return PackedData(data, count) if count > 1 else data
