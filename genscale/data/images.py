"""Images as training data: decoded, cut and mirrored, in canonical lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil

from genscale.data.image_decoding import Picture
from genscale.data.image_labels import Classes
from genscale.data.image_order import ShuffledImages
from genscale.data.image_reading import ImageReader, labelled
from genscale.data.image_sets import ImageSet, digest
from genscale.data.image_settings import HUB_SETTINGS, TABLE_SETTINGS, ImageDataSettings
from genscale.data.image_shards import ImageSpec
from genscale.data.image_sources import Opened, Order, first_images, kind_of, open_images
from genscale.data.image_stream import ImageStream, StreamedImages
from genscale.data.lanes import Cursor, Data, Sample
from genscale.errors import UserError, refuse_unheeded
from genscale.masking import masked_throughout
from genscale.rng import permutation

__all__ = ["ImageData", "ImageDataSettings"]

HASHES = 2**64


class ImageData(Data):
    """Samples `{"image": uint8 (channels, size, size)}`, with `label`, an int64 scalar, where `data.labels` is set.

    Args:
        settings: the `data` section.
        seed: the run's seed.
        for_training: False where only `validation` will be asked for: with a validation set of its own, the images to train on
            are not read.

    Attributes:
        size, channels: of the images.
        classes: names of the classes, or None without labels.
        order: the images to train on; None where they were not opened.

    Raises:
        UserError: whatever is wrong with the source or its labels.
    """

    def __init__(self, settings: ImageDataSettings, seed: int, for_training: bool = True) -> None:
        self.settings, self.seed, self.lane_count = settings, seed, settings.lanes
        self.size, self.channels = settings.size, settings.channels
        self._spec = _spec("data.source", settings.source, settings)
        _refuse_unheeded(settings)
        own = settings.validation_source is not None
        opened = Opened(None, None, settings.class_names)
        if for_training or settings.labels or not own:
            opened = open_images(self._spec, self._stream_order(0.0 if own else settings.validation_fraction),
                                 settings.validation_images, for_training)
        self.classes = opened.classes if settings.labels else None
        aside = self._other_validation_set() if own else opened.validation
        if settings.labels:
            _check_labels(opened.training, self._spec.where)
            _check_labels(aside, f"data.validation_source={settings.validation_source}" if own else self._spec.where)
        self.order: ShuffledImages | StreamedImages | None = None
        held = None if aside is None else (aside, np.arange(len(aside)))
        if for_training or held is None:
            self.order, out = self._ordered(opened.training, hold_out=held is None)
            held = held or out
        self._validation = self._validation_samples(*held)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validation": []}  # worker processes read lanes

    def _stream_order(self, fraction: float) -> Order:
        return Order(fraction, self.settings.window, self.seed, self.lane_count)

    def _reader(self, picture: Picture) -> ImageReader:
        return ImageReader(picture, self._spec.where, self.settings.bad_share)

    @property
    def _classes(self) -> Classes | None:
        return Classes(self.classes, self._spec.where) if self.classes else None

    def _other_validation_set(self) -> ImageSet:
        settings = self.settings
        spec = _spec("data.validation_source", settings.validation_source, settings, split="validation", classes=self.classes)
        opened = open_images(spec, self._stream_order(1.0), settings.validation_images, for_training=False)
        held = opened.validation or opened.training
        if isinstance(held, ImageStream):
            return first_images(held, settings.validation_images, spec, self._classes)
        return held

    def _ordered(self, images: ImageSet | ImageStream,
                 hold_out: bool) -> tuple[ShuffledImages | StreamedImages, tuple[ImageSet, np.ndarray] | None]:
        """The lanes, and the images held out of them: a set, and which of its images."""
        settings = self.settings
        picture = Picture(settings.size, settings.channels, settings.crop, settings.flip)
        if isinstance(images, ImageStream):
            order = StreamedImages(images, self._reader(picture), self._classes, self.seed, picture.draws)
            if not hold_out:
                return order, None
            out = first_images(images, settings.validation_images, self._spec, self._classes)
            return order, (out, np.arange(len(out)))
        hashes = images.hashes()
        held = _held_out(hashes, settings.validation_fraction if hold_out else 0.0)
        if hold_out and held.all():
            raise UserError(f"{self._spec.where}: its {len(images)} image(s) do not divide into a training and a validation "
                            "set; set data.validation_source")
        order = ShuffledImages(images, np.flatnonzero(~held), self._reader(picture), seed=self.seed, lanes=self.lane_count,
                               draws=picture.draws, labelled=settings.labels, identity=digest(images, hashes))
        return order, (images, np.flatnonzero(held))

    def _validation_samples(self, images: ImageSet, indices: np.ndarray) -> list[Sample]:
        settings = self.settings
        reader = self._reader(Picture(settings.size, settings.channels, "none" if settings.crop == "none" else "center"))
        # The same images for every seed, so that runs compare; spread over a set that is sorted by class.
        chosen = np.sort(indices[permutation(len(indices), 0, "validation")[: settings.validation_images]])
        _check_memory(len(chosen), settings)
        samples = []
        for index in chosen.tolist():
            pixels = reader.sample(partial(images.read, index), images.name(index), None)
            reader.count(images.name(index) if pixels is None else None)
            if pixels is not None:
                samples.append(labelled(pixels, images.labels[index]) if settings.labels else {"image": pixels})
        if not samples:
            raise reader.nothing_whole()
        return samples

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        return self.order.open_lane(lane, cursor)

    def cursor_at(self, position: int) -> Cursor | None:
        return self.order.cursor_at(position)

    def samples_of_epoch(self) -> int | None:
        return self.order.count

    def validation(self) -> list[Sample]:
        return self._validation

    def check(self, global_batch_size: int) -> None:
        count = self.order.at_least(global_batch_size)
        if count < global_batch_size:
            raise UserError(f"train.global_batch_size={global_batch_size}: the training set of {self._spec.where} has only "
                            f"{count} images, less than one global batch; set it to {count} at most")

    def plan(self) -> dict[str, Any]:
        names = ("source", "subset", "split", "size", "channels", "labels", "image_column", "label_column", "crop", "flip",
                 "validation_source", "validation_fraction", "validation_images", "lanes")
        settings = masked_throughout({name: getattr(self.settings, name) for name in names})
        return {**settings, "seed": self.seed, **self.order.plan()}

    def close(self) -> None:
        """Nothing stays open between two images."""


def image_specs(settings: ImageDataSettings) -> list[ImageSpec]:
    """The source, and that of the validation set where it has its own."""
    own = settings.validation_source
    return [_spec("data.source", settings.source, settings),
            *([_spec("data.validation_source", own, settings, split="validation")] if own is not None else [])]


def _spec(key: str, source: Sequence[str] | str, settings: ImageDataSettings, split: str | None = None,
          classes: Sequence[str] | None = None) -> ImageSpec:
    locations = (source,) if isinstance(source, str) else tuple(source)
    if not locations:
        raise UserError(f"{key}=[]: is an empty list; give at least one path, URL or hub name")
    several = locations if len(locations) > 1 else ()
    names = classes or settings.class_names
    return ImageSpec(key, f"{locations[0]} and {len(several) - 1} more" if several else locations[0], settings.subset,
                     split or settings.split, locations=several, image=settings.image_column,
                     label=settings.label_column if settings.labels else None, classes=tuple(names) if names else None,
                     retry_minutes=settings.retry_minutes)


def _refuse_unheeded(settings: ImageDataSettings) -> None:
    """Settings of hub datasets and tables where there is neither. Raises UserError."""
    locations = [settings.source] if isinstance(settings.source, str) else settings.source
    if settings.validation_source is not None:
        own = settings.validation_source
        locations = [*locations, *([own] if isinstance(own, str) else own)]
    kinds = {kind_of(location) for location in locations}
    beside = f"data.source {settings.source}"
    if "hub" not in kinds:
        refuse_unheeded("data", settings, HUB_SETTINGS, f"{beside}, which is no hub dataset")
    if not kinds & {"hub", "parquet"}:
        # A tar's .json members name their label like a column.
        names = TABLE_SETTINGS[:1] if "tar" in kinds else TABLE_SETTINGS
        refuse_unheeded("data", settings, names, f"{beside}, which has no columns")


def _check_labels(images: ImageSet | ImageStream | None, where: str) -> None:
    if isinstance(images, ImageSet) and images.labels is None:
        raise UserError(f"data.labels=true: not all images of {where} have a label; label them, or set data.labels to false")


def _held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which images to hold out: those whose content hashes low; where chance leaves none or all, the lowest."""
    if not fraction:
        return np.zeros(len(hashes), bool)
    held = hashes < np.uint64(int(fraction * HASHES))
    return held if held.any() and not held.all() else hashes == hashes.min()


def _check_memory(images: int, settings: ImageDataSettings) -> None:
    """Raises UserError where the validation set, which every process holds, is more than this machine's memory."""
    each, memory = settings.channels * settings.size**2, psutil.virtual_memory().total
    if images * each > memory:
        raise UserError(f"data.size: {images} images of {settings.size} pixels to validate on are {images * each / 2**30:,.0f} "
                        f"GiB, and this machine has {memory / 2**30:,.0f} GiB of memory; at most data.validation_images "
                        f"{memory // each} fit")
