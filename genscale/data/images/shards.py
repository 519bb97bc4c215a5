"""Parquet files, hub datasets and WebDataset tars of images, local or by URL, as shards of records."""

from __future__ import annotations

import json
import logging
import re
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from PIL import Image

from genscale.data.file_tables import HELD, ROWS, At, Rows, open_parquet, parquet_rows
from genscale.data.folders import TRAINING, VALIDATION, Folder, examples, walk
from genscale.data.images.labels import Label, composed, label_of
from genscale.data.images.paths import content_at
from genscale.data.images.settings import ARRAY_BYTES, IMAGE_BYTES
from genscale.data.images.tars import LABEL_BYTES, LABELS, Archive, CheckedInfo, Group
from genscale.data.readers import TableShard, damaged
from genscale.data.shard import Row, Shard
from genscale.data.source_file import SourceFile, TooLarge
from genscale.data.spec import Spec
from genscale.errors import UserError, as_utf8, nearest

NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC"}
"""What Pillow opens though it is no picture, or needs another program to be one."""
TAR_FILES = (".tar", ".tar.gz", ".tgz")
TABLE_BYTES = 2**27
"""Bytes of images in memory at a time, as they are in a table of values that were packed to less than a `GROWTH`th."""
GROWTH = 4
INTEGER = re.compile(r"[+-]?\d{1,18}")

log = logging.getLogger("genscale")


@lru_cache
def _names_of(metadata: bytes | None, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes in what `datasets` writes about a table."""
    try:
        names = json.loads(metadata or b"{}")["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):  # of a stranger's making, or of another kind of column
        return None
    return tuple(composed(str(name)) for name in names) if isinstance(names, list) else None


@lru_cache
def _rows_at_once(file: SourceFile, name: str, spec: ImageSpec) -> int:
    """Rows of a parquet file that fit into memory whatever is in them: a value that is stored once may be in each.

    Raises:
        UserError: its images are too large.
    """
    largest = 1
    with open_parquet(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        kind = schema.field(spec.image).type if spec.image in schema.names else None
        width = getattr(kind, "byte_width", 0) if str(kind).startswith("fixed_size_binary") else 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [column for column in (group.column(i) for i in range(group.num_columns))
                       if column.path_in_schema.split(".")[0] == spec.image]
            stored = sum(column.total_uncompressed_size for column in columns)
            if max(width, stored / max(1, group.num_rows)) > spec.max_image_bytes:
                raise UserError(f"{spec.where}: the images of {name} are too large: {stored:,} bytes in {group.num_rows:,} "
                                f"rows, and data.max_image_bytes={spec.max_image_bytes:,}; raise that, or remove it")
            grows = stored > GROWTH * sum(column.total_compressed_size for column in columns)  # which images do not
            largest = max(largest, width, stored if grows else 1)
    return max(1, min(ROWS, TABLE_BYTES // largest))


def _holds_images(kind: Any) -> bool:
    """Whether a column's type is that of an image file's bytes, or of a struct with them or a path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if "bytes" not in fields:
            return False
        return _holds_images(fields["bytes"]) and not (pa.types.is_null(fields["bytes"]) and "path" not in fields)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    types = pa.types
    tests = (types.is_null, types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)
IMAGE, SHARD, ARRAYS = "image", "shard", "arrays"


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of the pictures that Pillow reads, in lower case. (Asking it loads all its formats.)"""
    Image.init()
    read = {*Image.OPEN, "MPO"} - NO_PICTURES
    return tuple(ending for ending, kind in Image.registered_extensions().items() if kind in read)


class Record(NamedTuple):
    """An image file (empty where there is none), what to call it, and its label as the source has it."""

    name: str
    content: bytes
    label: Label


@dataclass(frozen=True)
class ImageSpec(Spec):
    """A source of images to read.

    Attributes:
        image, label: columns of the images and of their labels; None: labels are not read.
        classes: names of the classes, where they are known.
        renames: the settings give them, so that they may call a table's own classes otherwise.
        max_image_bytes, max_array_bytes, value_range: see `ImageDataSettings`.
    """

    image: str = "image"
    label: str | None = None
    classes: tuple[str, ...] | None = None
    renames: bool = False
    max_image_bytes: int = IMAGE_BYTES
    max_array_bytes: int = ARRAY_BYTES
    value_range: tuple[float, float] | None = None
    local_advice: ClassVar[str] = "give the path of a local file or folder (.npz, .parquet, .tar, images), or digits"

    @property
    def where(self) -> str:
        """The source for messages."""
        return f"{self.key}={self.name}"

    @property
    def content(self) -> dict[str, str]:
        return {"image_column": self.image, **({"label_column": self.label} if self.label else {})}

    def unknown_columns(self, where: str, columns: Sequence[str]) -> UserError | None:
        for setting, column in self.content.items():
            if column not in columns:
                purpose = "images" if setting == "image_column" else "labels (or data.labels to false)"
                return UserError(f"data.{setting}={column}: {where} of {self.where} has the columns {', '.join(columns)}"
                                 f"{nearest(column, columns)}; set data.{setting} to the one that holds the {purpose}")
        return None


class ImageTableShard(TableShard):
    """A parquet file or a hub dataset, or one of its parts, with a column of images."""

    spec: ImageSpec

    def open(self) -> Any:
        import datasets

        try:
            stream = super().open()
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None
        features = stream.features or {}
        if features and (unknown := self.spec.unknown_columns(self.name, list(features))):
            raise unknown
        if isinstance(features.get(self.spec.image), datasets.Image):  # else other formats than parquet are decoded and encoded
            stream = stream.cast_column(self.spec.image, datasets.Image(decode=False))
        return stream.select_columns(self.spec.columns) if features else stream

    def class_names(self) -> list[str] | None:
        """Names that the label column brings along."""
        if self.file is None:
            feature = (self.open().features or {}).get(self.spec.label)
            return list(feature.names) if feature is not None and hasattr(feature, "names") else None
        try:
            with open_parquet(self.file) as opened:
                self.check_columns(opened.schema_arrow.names)
                names = _names_of((opened.schema_arrow.metadata or {}).get(b"huggingface"), self.spec.label)
                return list(names) if names else None
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None

    def _file_tables(self, start: int, at: At | None) -> Iterator[Rows]:
        group = self.part[0] if self.part[1] > 1 else None
        assert self.file is not None
        at_once = _rows_at_once(self.file, self.name, self.spec)
        return parquet_rows(self.file, self.spec.columns, self.check_columns, group, HELD, start, at_once)

    def documents(self, table: Any, first: int, start: int, step: int) -> list[Record]:
        import pyarrow as pa

        spec = self.spec
        if error := spec.unknown_columns(self.name, table.column_names):
            raise error
        rows = table.take(pa.array(range(start, len(table), step), pa.int64()))
        kind = rows[spec.image].type
        if not _holds_images(kind):
            raise UserError(f"data.image_column={spec.image}: in {self.name} of {spec.where} it holds {kind}, not the bytes of "
                            f"image files; the columns are {', '.join(table.column_names)}")
        labels = self._labels(rows) if spec.label else [None] * len(rows)
        records = zip(rows[spec.image].to_pylist(), labels, strict=True)
        names = (f"row {first + start + i * step} of {self.name}" for i in range(len(rows)))
        return [Record(name, self._content(image, name), label) for name, (image, label) in zip(names, records, strict=True)]

    def _labels(self, rows: Any) -> list[Label]:
        """Numbers that the table itself has names for are these names, but where the classes are given by others: each table
        counts its own."""
        labels = [label_of(label) for label in rows[self.spec.label].to_pylist()]
        names = _names_of((rows.schema.metadata or {}).get(b"huggingface"), self.spec.label)
        if not names:
            return labels
        if self.spec.renames and not {composed(name) for name in self.spec.classes or ()}.intersection(names):
            return [None if label == -1 else label for label in labels]
        return [names[label] if isinstance(label, int) and 0 <= label < len(names) else None if label == -1 else label
                for label in labels]

    def _content(self, image: Mapping[str, Any] | bytes | None, row: str) -> bytes:
        """What is in a cell: a file's bytes, or a struct of bytes and a path, of which one may be missing."""
        if not isinstance(image, Mapping):
            return image or b""
        if image.get("bytes") is None and image.get("path"):
            try:
                return content_at(image["path"], self, row)
            except UserError:
                raise
            except Exception as error:
                raise damaged(self, error) from None
        return image.get("bytes") or b""


@dataclass(frozen=True)
class TarShard(Shard):
    """A WebDataset: members `key.jpg` (or another image format) and `key.cls` or `key.json` stand beside each other."""

    name: str
    size: int
    spec: ImageSpec
    file: SourceFile

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1, at: At | None = None) -> Iterator[Row]:
        offset, row = at or (0, 0)
        whole = not (start or residue or at)
        theirs = (tarfile.TarError, OSError, EOFError, zlib.error)
        streamed = not self.file.seekable
        mode: Literal["r|", "r:"] = "r|" if streamed else "r:"
        base = offset if streamed else 0
        where = f"{self.spec.where}: {self.name}"
        try:
            with (self.file.open(offset, self.spec.max_image_bytes) as file,
                  closing(tarfile.open(fileobj=file, mode=mode, tarinfo=CheckedInfo)) as opened):
                archive = Archive(opened, image_endings(), self.spec.max_image_bytes, where, streamed)
                for begin, groups in archive.groups():
                    place = [begin + base, row]
                    for group in groups:
                        if row >= start and row % modulus == residue:
                            yield Row(row, self._record(archive, group), place)
                        row += 1
        except TooLarge as error:
            raise UserError(f"data.max_image_bytes={self.spec.max_image_bytes:,}: {where} is too large: {error}; remove it, "
                            "decompress it, or raise the bound to its size") from None
        except theirs as error:
            raise UserError(f"{where} is damaged or not what its name says ({type(error).__name__}: {error}); mend or remove "
                            "it") from None
        if whole and archive.left.count:
            _say_once(f"{where}: {archive.left.count:,} of its files belong to no image, the first is {archive.left.first}; "
                      "they are passed over")

    def _record(self, archive: Archive, group: Group) -> Record:
        label = self._label(archive, group) if self.spec.label else None
        image = group.image
        assert image is not None  # an archive gives no group without
        return Record(f"{group.key} of {self.name}", archive.read(group.members[image]), label)

    def _label(self, archive: Archive, group: Group) -> Label:
        kind = next((kind for kind in LABELS if kind in group.members), None)
        if kind is None:
            return None
        content = archive.read(group.members[kind])
        where = f"{self.spec.where}: {group.key}.{kind} of {self.name}"
        if len(content) > LABEL_BYTES:
            raise UserError(f"{where} is too large for a label (more than {LABEL_BYTES:,} bytes); mend it")
        if kind == "cls":
            text = str(label_of(content.removeprefix(BOM_UTF8)) or "").strip()
            return int(text) if INTEGER.fullmatch(text) else text or None
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}); mend it") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where} holds {fields!r:.60}, and a label is read from an object with the field "
                            f"{self.spec.label}; mend it, or write labels as .cls")
        if self.spec.label not in fields:
            raise UserError(f"data.label_column={self.spec.label}: {group.key}.json of {self.name} of {self.spec.where} has "
                            f"the fields {', '.join(fields)}{nearest(str(self.spec.label), fields)}; set data.label_column to "
                            "the one that holds the labels, or data.labels to false")
        return label_of(fields[self.spec.label])


@lru_cache
def _say_once(line: str) -> None:
    log.warning(line)


def shard_of(file: SourceFile, name: str, spec: ImageSpec) -> Shard | None:
    """The shard that a file is by its name, or None for one of another kind."""
    if file.name.endswith(".parquet"):
        return ImageTableShard(name, file.size, spec, file)
    return TarShard(name, file.size, spec, file) if file.name.endswith(TAR_FILES) else None


def shard_kind(name: str) -> str | None:
    """`SHARD` for the name of a parquet or tar file."""
    return SHARD if name.lower().endswith((".parquet", *TAR_FILES)) else None


def _kind(name: str) -> str | None:
    if name.lower().endswith(image_endings()):
        return IMAGE
    # Others than these (statistics, features) are not read where they lie in a folder.
    return ARRAYS if re.fullmatch(rf"({'|'.join((*TRAINING, *VALIDATION))})\.npz", name, re.IGNORECASE) else shard_kind(name)


def look(root: Path, spec: ImageSpec) -> Folder:
    """What lies below a folder: images, parquet and tar files, and those .npz files that make a training or validation set.

    Raises:
        UserError: it holds several of these kinds, so that it is not clear which is meant, or cannot be looked at.
    """
    found = walk(root, _kind, spec.where)
    kinds = [files for kind in (IMAGE, SHARD, ARRAYS) if (files := found.of(kind))]
    if len(kinds) > 1:
        held = " and ".join(f"{len(files):,} {'file' if files[0].kind != IMAGE else 'image'}{'s' * (len(files) > 1)} "
                            f"({examples(file.name for file in files)})" for files in kinds)
        raise UserError(f"{spec.where}: holds {held} beside each other, and it is not clear which are meant; give "
                        f"{root / as_utf8(kinds[-1][0].name)}, or a folder with one of the two alone")
    return found


def local_shards(root: Path, spec: ImageSpec, found: Folder) -> list[Shard]:
    """The parquet and tar files below a folder, in the order of their names.

    Raises:
        UserError: one cannot be looked at.
    """
    try:
        shards = [shard_of(SourceFile.local(root / file.name, spec.where), as_utf8(file.name), spec)
                  for file in found.of(SHARD)]
        return [shard for shard in shards if shard is not None]
    except OSError as error:
        raise UserError(f"{spec.where}: cannot be read ({error}); mend or remove it") from None
