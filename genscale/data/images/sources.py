"""What `data.source` names: images by number where they fit into memory or are files, else a stream of records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genscale.data.folders import TRAINING, VALIDATION, refuse_no_file, say_parts, say_repeated, walk
from genscale.data.images.files import array_file, digits, image_parts
from genscale.data.images.labels import Classes, classes_of, numbered
from genscale.data.images.sets import ImageSet, PackedSet
from genscale.data.images.settings import DIGITS
from genscale.data.images.shards import SHARD, TAR_FILES, TarShard, local_shards, look, shard_kind, shard_of
from genscale.data.images.source_rows import source_shards
from genscale.data.images.spec import ImageSpec, Record
from genscale.data.images.stream import ImageStream
from genscale.data.images.tables import ImageTableShard
from genscale.data.locations import find_urls, hub_revision, quiet_datasets
from genscale.data.readers import Shard, known_size, place, split
from genscale.data.row_source import open_installed
from genscale.data.source_file import SourceFile, is_url, url_path
from genscale.data.spec import is_installed
from genscale.errors import UserError, as_utf8, nearest
from genscale.masking import masked

MEMORY_LIMIT = 256 * 2**20
"""Bytes of parquet or tar files up to which they are held in memory."""
READ = "; .npz, .parquet, .tar and folders of images are read"


@dataclass(frozen=True)
class Opened:
    """A source's images to train on (None: not opened), those to validate on where it brings them, and the names of its
    classes."""

    training: ImageSet | ImageStream | None
    validation: ImageSet | None
    classes: list[str] | None


@dataclass(frozen=True)
class Order:
    """What streams are ordered by: see `StreamSource`."""

    fraction: float
    window: int
    seed: int
    lanes: int


def open_images(spec: ImageSpec, order: Order, validation: int, for_training: bool = True) -> Opened:
    """The images of a source.

    Args:
        validation: images that are wanted of a validation set too large for memory.
        for_training: False where the training images are wanted only if the source has no validation set of its own.

    Raises:
        UserError: nothing there, nothing that is read, or labels that are no classes.
    """
    classes = list(spec.classes) if spec.classes else None
    if spec.name == DIGITS:
        found = digits()
        found.places = [DIGITS]
        if classes and classes != found.classes:
            raise UserError(f"{spec.where}: has the classes {', '.join(found.classes or [])}, not {', '.join(classes)}; leave "
                            "data.class_names out, or give a source of those classes")
        return _opened(found, None)
    if not spec.locations and not is_url(spec.name):
        if (source := open_installed(spec)) is not None:
            return _shards(spec, order, validation, classes, for_training, source_shards(source, spec))
        path = Path(spec.name).expanduser()
        if path.is_file() and path.suffix.lower() == ".npz":
            return _opened(array_file(spec, path, classes), None)
        if path.is_dir():
            folder = look(path, spec)
            folder.say()
            if not folder.of(SHARD):
                training, held = image_parts(spec, path, folder)
                images = training(classes)
                return _opened(images, held(images.classes) if held else None)
            return _shards(spec, order, validation, classes, for_training, _by_name(local_shards(path, spec, folder), spec))
    return _shards(spec, order, validation, classes, for_training, find_shards(spec))


def _opened(training: ImageSet, validation: ImageSet | None) -> Opened:
    return Opened(training, validation, training.classes)


def _shards(spec: ImageSpec, order: Order, validation: int, classes: list[str] | None, for_training: bool,
            shards: tuple[list[Shard], list[Shard]]) -> Opened:
    """A source of parquet or tar files, or of the hub."""
    training, held = shards
    if spec.label and classes is None and isinstance(training[0], ImageTableShard):
        classes = training[0].class_names()
    known = Classes(classes, spec.where) if classes else None
    small = _packed(training, spec, known) if for_training or not held or (spec.label and not known) else None
    if small is not None and small.classes:
        known = Classes(small.classes, spec.where)
    elif small is None and spec.label and known is None:
        raise UserError(f"data.class_names=None: {spec.where} does not tell the names of its classes, and is too large to be "
                        "read for them; set them, or data.labels to false")
    aside = None
    if held:
        aside = _packed(held, spec, known)
        if aside is None:
            aside = first_images(_stream(held, spec, replace(order, fraction=1.0)), validation, spec, known)
    images: ImageSet | ImageStream | None
    if small is None and (for_training or aside is None):
        images = _stream(training, spec, replace(order, fraction=0.0) if held else order)
    else:
        images = aside if small is None else small
    return Opened(images, aside, known.names if known else None)


def _stream(shards: list[Shard], spec: ImageSpec, order: Order) -> ImageStream:
    if len(shards) < order.lanes:
        shards = [part for shard in shards for part in split(shard, order.lanes)]
    return ImageStream(shards, order.fraction, order.window, spec, order.seed, order.lanes)


def first_images(stream: ImageStream, count: int, spec: ImageSpec, classes: Classes | None) -> PackedSet:
    """At most so many of a stream's held-out images.

    Raises:
        UserError: there is none.
    """
    records = stream.sample_held_out(count)
    if not records:
        raise UserError(f"data.validation_fraction={stream.fraction}: no image of {spec.where} falls into the validation set; "
                        "set a larger share, or data.validation_source")
    images = pack(records, spec, classes)
    images.places = stream.places
    return images


def _packed(shards: Sequence[Shard], spec: ImageSpec, classes: Classes | None) -> PackedSet | None:
    """All images of the shards, or None where they exceed `MEMORY_LIMIT` (compressed files and streams tell only when read)."""
    size = known_size(shards)
    if size is None or size > MEMORY_LIMIT or any(
            isinstance(shard, TarShard) and not shard.size and is_url(shard.file.path) for shard in shards):
        return None
    records, size = [], 0
    for shard in shards:
        for _, record, _ in shard.rows():
            records.append(record)
            size += len(record.content)
            if size > MEMORY_LIMIT:
                return None
    if not records:
        raise UserError(f"{spec.where}: holds no image; give one that does")
    images = pack(records, spec, classes)
    images.places = list(map(place, shards))
    return images


def pack(records: Iterable[Record], spec: ImageSpec, classes: Classes | None) -> PackedSet:
    """Records as a set. Without `classes` they are those that the labels stand for."""
    records = list(records)
    labels, names = [record.label for record in records], [record.name for record in records]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{spec.where}: {twice} comes up twice; give every image a name of its own, beside its label")
    if spec.label and classes is None:
        classes = classes_of(labels, names, spec.where)
    numbers = numbered(labels, names, classes) if spec.label and classes else None
    return PackedSet([(record.name, record.content) for record in records], numbers, classes.names if classes else None)


def find_shards(spec: ImageSpec) -> tuple[list[Shard], list[Shard]]:
    """The shards to train on, and those to validate on where the source has such, in a fixed order.

    Raises:
        UserError: nothing there, nothing readable, or the server or the hub does not answer.
    """
    if not spec.locations and not is_url(spec.name):
        path = Path(spec.name).expanduser()
        if path.is_dir():
            return _by_name(local_shards(path, spec, look(path, spec)), spec)
        if not path.exists():
            return _hub(spec, path)
    say_repeated(spec.locations, spec.key)
    locations = spec.locations or (spec.name,)
    urls = [name for name in locations if is_url(name)]
    found = {file.path: file for file in (find_urls(spec, urls) if urls else [])}
    shards = []
    for number, location in enumerate(locations):
        path = Path(location).expanduser()
        if location not in found and path.is_dir():
            raise UserError(f"{spec.key}: {location} is a folder, and folders of images cannot be listed; give one folder "
                            "(links in it to the others are followed), or a list of .parquet and .tar files")
        refuse_no_file(path, f"{spec.key}={location}")
        if location not in found and not path.is_file():
            raise _nothing(spec, location, path)
        name = masked(location) if location in found else as_utf8(path.name)
        file = found.get(location) or SourceFile.local(path, spec.where)
        shard = shard_of(file, f"{number}:{name}" if spec.locations else name, spec)
        if shard is None:
            raise UserError(f"{spec.key}={location}: files of this kind are not read{READ}")
        shards.append(shard)
    return shards, []


def kind_of(location: str) -> str:
    """What a location is by its name and what stands there: rows (of an installed source), hub, parquet, tar or files."""
    path = Path(location).expanduser()
    if is_installed(location):
        return "rows"
    if not is_url(location) and location != DIGITS and not path.exists():
        return "hub"
    if path.is_dir():
        names = [file.name.lower() for file in walk(path, shard_kind, location).files]
        return "parquet" if any(name.endswith(".parquet") for name in names) else "tar" if names else "files"
    name = url_path(location).lower() if is_url(location) else location.lower()
    return "parquet" if name.endswith(".parquet") else "tar" if name.endswith(TAR_FILES) else "files"


def _nothing(spec: ImageSpec, location: str, path: Path) -> UserError:
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
    return UserError(f"{spec.key}={location}: there is no such file or folder{near}; give an existing one, a URL "
                     f"(https://...), a hub name, or {DIGITS}")


def _by_name(shards: list[Shard], spec: ImageSpec) -> tuple[list[Shard], list[Shard]]:
    """Shards divided as the Hugging Face hub names them: train-00000.parquet, validation/0.tar, ... Beside a validation set
    all that is called nothing of the kind is trained on."""
    parts: dict[str, list[Shard]] = {}
    for shard in shards:
        words = re.findall(r"(?:^|/)([a-z]+)(?![a-z])", shard.name.lower())
        parts.setdefault(next((word for word in words if word in (*TRAINING, *VALIDATION)), ""), []).append(shard)
    training = next((parts[word] for word in (*TRAINING, "") if word in parts), shards)
    held = next((parts[word] for word in VALIDATION if word in parts), []) if training is not shards else []
    if len(training) < len(shards):
        others = [shard.name for part in parts.values() if part is not training and part is not held for shard in part]
        say_parts(spec.where, [shard.name for shard in training], [shard.name for shard in held], others)
    return training, held


def _hub(spec: ImageSpec, path: Path) -> tuple[list[Shard], list[Shard]]:
    if Path(url_path(spec.name)).suffix in (".npz", ".parquet", ".tar") or not re.fullmatch(
            r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec.name):
        raise _nothing(spec, spec.name, path)
    spec = replace(spec, revision=hub_revision(spec))
    name = f"{spec.name}@{spec.revision}"
    training = [ImageTableShard(name, 0, spec)]
    for shard in training:
        shard.open()  # what is wrong with the name of a split or a column shows here
    datasets = quiet_datasets()
    there = datasets.get_dataset_split_names(spec.name, spec.subset, revision=spec.revision)
    held = next((word for word in VALIDATION if word in there and word != spec.split), None)
    return [*training], [ImageTableShard(f"{name}:{held}", 0, replace(spec, split=held))] if held else []
