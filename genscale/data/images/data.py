"""Images as training data: decoded, cut and mirrored, in canonical lanes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import psutil

from genscale.data.folders import say_seen
from genscale.data.images.decoding import FULL_RANGE, Picture, Range
from genscale.data.images.grouped import ImagesInLanes
from genscale.data.images.labels import Classes, uneven
from genscale.data.images.order import ShuffledImages
from genscale.data.images.ranges import LOOKED_AT, ranges_of, warn_of_blank
from genscale.data.images.reading import ImageReader, labelled
from genscale.data.images.sets import ImageSet, content_hash, digest
from genscale.data.images.settings import HUB_SETTINGS, TABLE_SETTINGS, ImageDataSettings
from genscale.data.images.sources import Opened, Order, first_images, kind_of, open_images
from genscale.data.images.spec import ImageSpec, Record
from genscale.data.images.stream import ImageStream, StreamedImages
from genscale.data.lanes import Cursor, Sample
from genscale.data.plans import digest_of
from genscale.data.spec import with_options
from genscale.errors import UserError, refuse_unheeded
from genscale.masking import masked_throughout
from genscale.rng import permutation

__all__ = ["ImageData", "ImageDataSettings"]

HASHES = 2**64

log = logging.getLogger("genscale")


class ImageData(ImagesInLanes):
    """Samples `{"image": uint8 (channels, size, size)}`, with `label`, an int64 scalar, where `data.labels` is set.

    Args:
        settings: the `data` section.
        seed: the run's seed.
        for_training: False where only `validation` will be asked for: with a validation set of its own, the images to train on
            are not read.

    Attributes:
        size, channels: of the images.
        classes: names of the classes, or None without labels.
        order: the images to train on, where they were opened.

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
        aside = opened.validation if settings.validation_source is None else \
            self._other_validation_set(settings.validation_source)
        self._ranges: Mapping[str, Range] = {}
        trained: np.ndarray | None = None
        held, whole = (None if aside is None else (aside, np.arange(len(aside)))), None
        seen = own and aside is not None and for_training and opened.training is not None and say_seen(
            f"data.validation_source={settings.validation_source}", self._spec.where, aside.places, opened.training.places)
        if for_training or held is None:
            assert opened.training is not None
            whole = self._picture(opened.training, self._spec.where, settings.crop, settings.flip)
            self._ranges = whole.ranges
            self.order, out, trained = self._ordered(opened.training, whole, hold_out=held is None)
            held = held or out
        crop = "none" if settings.crop == "none" else "center"
        if aside is None:
            assert whole is not None
            picture = replace(whole, crop=crop, flip=False)
        else:
            where = f"data.validation_source={settings.validation_source}" if own else f"{self._spec.where}, validation set"
            picture = self._picture(aside, where, crop, flip=False)
            _check_alike(whole, picture, where)
        assert held is not None
        chosen = self._chosen(held[1])
        self._validation = self._validation_samples(held[0], chosen, picture)
        self._validation_digest: str | None = None
        if aside is not None:
            hashes = np.fromiter((content_hash(aside.read(index)) for index in chosen.tolist()), np.uint64, len(chosen))
            if trained is not None and not seen:
                _say_copies(hashes, trained, where)
            # Of what is in the files: what decoders make of them differs between machines.
            self._validation_digest = digest_of([hashes] if aside.labels is None else [hashes, aside.labels[chosen]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validation": []}  # worker processes read lanes

    def _picture(self, images: ImageSet | ImageStream, where: str, crop: str, flip: bool) -> Picture:
        """How images of this source are decoded, of which some are looked at."""
        settings = self.settings
        range_ = Range(*settings.value_range) if settings.value_range else None
        picture = Picture(settings.size, settings.channels, crop, flip, settings.max_image_pixels, settings.max_image_bytes,
                          range_)
        some = _some(images)
        if range_ is None:
            picture = replace(picture, ranges=ranges_of(some, picture, where))
        warn_of_blank(some, picture, where)
        return picture

    def _stream_order(self, fraction: float) -> Order:
        return Order(fraction, self.settings.window, self.seed, self.lane_count)

    def _reader(self, picture: Picture) -> ImageReader:
        return ImageReader(picture, self._spec.where, self.settings.bad_share)

    @property
    def _classes(self) -> Classes | None:
        return Classes(self.classes, self._spec.where) if self.classes else None

    def _other_validation_set(self, source: Sequence[str] | str) -> ImageSet:
        settings = self.settings
        spec = _spec("data.validation_source", source, settings, split="validation", classes=self.classes)
        opened = open_images(spec, self._stream_order(1.0), settings.validation_images, for_training=False)
        held = opened.validation or opened.training
        assert held is not None
        if isinstance(held, ImageStream):
            return first_images(held, settings.validation_images, spec, self._classes)
        return held

    def _ordered(self, images: ImageSet | ImageStream, picture: Picture,
                 hold_out: bool) -> tuple[ShuffledImages | StreamedImages, tuple[ImageSet, np.ndarray] | None,
                                          np.ndarray | None]:
        """The lanes; the images held out of them: a set, and which of its images; and the hashes of all, of no stream."""
        settings = self.settings
        if isinstance(images, ImageStream):
            streamed = StreamedImages(images, self._reader(picture), self._classes, self.seed, picture.draws)
            if not hold_out:
                return streamed, None, None
            out = first_images(images, settings.validation_images, self._spec, self._classes)
            return streamed, (out, np.arange(len(out))), None
        hashes = images.hashes()
        held = _held_out(hashes, settings.validation_fraction if hold_out else 0.0)
        if hold_out and held.all():
            alike = ", all alike," if len(images) > 1 else ""
            raise UserError(f"{self._spec.where}: its {len(images)} image(s){alike} do not divide into a training and a "
                            "validation set; set data.validation_source")
        order = ShuffledImages(images, np.flatnonzero(~held), self._reader(picture), seed=self.seed, lanes=self.lane_count,
                               draws=picture.draws, labelled=settings.labels, identity=digest(images, hashes))
        counts = order.class_counts() if settings.labels else None
        if images.classes and counts is not None and (unevenness := uneven(images.classes, counts)):
            log.warning("%s: %s", self._spec.where, unevenness)
        return order, (images, np.flatnonzero(held)), hashes

    def _chosen(self, indices: np.ndarray) -> np.ndarray:
        """Those to validate on."""
        # The same images for every seed, so that runs compare; spread over a set that is sorted by class.
        return np.sort(indices[permutation(len(indices), 0, "validation")[: self.settings.validation_images]])

    def _validation_samples(self, images: ImageSet, chosen: np.ndarray, picture: Picture) -> list[Sample]:
        settings, reader = self.settings, self._reader(picture)
        _check_memory(len(chosen), settings)
        samples, labels = [], images.labels if settings.labels else None
        for index in chosen.tolist():
            pixels = reader.sample(partial(images.read, index), images.name(index), None)
            reader.count(images.name(index) if pixels is None else None)
            if pixels is not None:
                samples.append({"image": pixels} if labels is None else labelled(pixels, labels[index]))
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
        # What was not always there stands in the plan where it is set alone: earlier runs go on.
        later = tuple(name for name in ("value_range", "options") if getattr(self.settings, name) is not None)
        settings = masked_throughout({name: getattr(self.settings, name) for name in (*names, *later)})
        own = {"validation_content": self._validation_digest} if self._validation_digest else {}
        # Of 16 bits that are used in full nothing need be said: so they have always been read.
        ranges = {mode: list(range_) for mode, range_ in self._ranges.items() if range_ != FULL_RANGE}
        return {**settings, "seed": self.seed, **self.order.plan(), **own, **({"ranges": ranges} if ranges else {})}

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
    options = settings.options if source == settings.source else None
    spec = ImageSpec(key, f"{locations[0]} and {len(several) - 1} more" if several else locations[0], settings.subset,
                     split or settings.split, locations=several, image=settings.image_column,
                     label=settings.label_column if settings.labels else None, classes=tuple(names) if names else None,
                     renames=bool(settings.class_names),
                     retry_minutes=settings.retry_minutes, max_image_bytes=settings.max_image_bytes,
                     max_array_bytes=settings.max_array_bytes, value_range=settings.value_range, options=options)
    return with_options(spec)


def _refuse_unheeded(settings: ImageDataSettings) -> None:
    """Settings of hub datasets and tables where there is neither, and a range that is none. Raises UserError."""
    if settings.value_range and settings.value_range[0] == settings.value_range[1]:
        raise UserError(f"data.value_range: {list(settings.value_range)} makes black and white the same; give two numbers, "
                        "as in [0, 255]")
    locations = [settings.source] if isinstance(settings.source, str) else settings.source
    if settings.validation_source is not None:
        own = settings.validation_source
        locations = [*locations, *([own] if isinstance(own, str) else own)]
    if all(getattr(settings, name) == getattr(ImageDataSettings, name) for name in (*HUB_SETTINGS, *TABLE_SETTINGS)):
        return  # looking through a large folder takes its time
    kinds = {kind_of(location) for location in locations}
    beside = f"data.source {settings.source}"
    if "hub" not in kinds:
        refuse_unheeded("data", settings, HUB_SETTINGS, f"{beside}, which is no hub dataset")
    if not kinds & {"hub", "parquet", "rows"}:
        # A tar's .json members name their label like a column.
        names = TABLE_SETTINGS[:1] if "tar" in kinds else TABLE_SETTINGS
        refuse_unheeded("data", settings, names, f"{beside}, which has no columns")


def _some(images: ImageSet | ImageStream) -> list[tuple[str, Callable[[], bytes | np.ndarray]]]:
    """A few images, from all over a set or from the beginning of a stream: (name, what reads it)."""
    if isinstance(images, ImageStream):
        records = cast(Iterator[Record], images.documents())
        return [(record.name, partial(getattr, record, "content")) for record in islice(records, LOOKED_AT)]
    chosen = np.unique(np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)).tolist()
    return [(images.name(index), partial(images.read, index)) for index in chosen]


def _check_alike(training: Picture | None, validation: Picture, where: str) -> None:
    """A line in the log where the same numbers are taken for other shades in the two sets."""
    for mode, range_ in validation.ranges.items():
        of_training = range_ if training is None else training.ranges.get(mode, range_)
        if of_training != range_:
            log.warning("%s: %g is taken for white in its pictures of mode %s, and %g in those to train on; set "
                        "data.value_range", where, range_.white, mode, of_training.white)


def _say_copies(hashes: np.ndarray, trained: np.ndarray, where: str) -> None:
    """A line in the log where most of the images to validate on are also trained on, by their content."""
    both = int(np.isin(hashes, trained).sum())
    if 2 * both > len(hashes):
        log.warning("%s: %d of its %d images are trained on too, under other names; its loss says little about what the model "
                    "has not seen", where, both, len(hashes))


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
