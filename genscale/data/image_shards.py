"""Parquet files, hub datasets and WebDataset tars of images, local or by URL, as shards of records."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from genscale.data.file_tables import At, open_parquet
from genscale.data.folders import TRAINING, VALIDATION, Folder, examples, walk
from genscale.data.image_labels import Label
from genscale.data.image_paths import content_at
from genscale.data.readers import Row, Shard, TableShard, damaged
from genscale.data.source_file import SourceFile
from genscale.data.spec import Spec
from genscale.errors import UserError, as_utf8, nearest

NO_PICTURES = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC"}
"""What Pillow opens though it is no picture, or needs another program to be one."""
TAR_FILES = (".tar", ".tar.gz", ".tgz")
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
        classes: names of the classes, where the settings give them.
    """

    image: str = "image"
    label: str | None = None
    classes: tuple[str, ...] | None = None
    local_advice: ClassVar[str] = "give the path of a local file or folder (.npz, .parquet, .tar, images), or digits"

    @property
    def where(self) -> str:
        """The source for messages."""
        return f"{self.key}={self.name}"

    @property
    def content(self) -> dict[str, str]:
        return {"image_column": self.image, **({"label_column": self.label} if self.label else {})}

    def unknown_columns(self, where: str, columns: list[str]) -> UserError | None:
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
        if features and (error := self.spec.unknown_columns(self.name, list(features))):
            raise error
        if isinstance(features.get(self.spec.image), datasets.Image):  # else other formats than parquet are decoded and encoded
            stream = stream.cast_column(self.spec.image, datasets.Image(decode=False))
        return stream.select_columns(self.spec.columns) if features else stream

    def class_names(self) -> list[str] | None:
        """Names that the label column brings along."""
        feature = self._features().get(self.spec.label)
        return list(feature.names) if hasattr(feature, "names") else None

    def _features(self) -> Mapping[str, Any]:
        import datasets

        if self.file is None:
            return self.open().features or {}
        try:
            with open_parquet(self.file) as opened:
                self.check_columns(opened.schema_arrow.names)
                return datasets.Features.from_arrow_schema(opened.schema_arrow)
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None

    def documents(self, table: Any, first: int, start: int, step: int) -> list[Record]:
        import pyarrow as pa

        spec = self.spec
        if error := spec.unknown_columns(self.name, table.column_names):
            raise error
        rows = table.take(pa.array(range(start, len(table), step), pa.int64()))
        kind = rows[spec.image].type
        within = [kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"] or [kind]
        if not pa.types.is_null(kind) and not any(test(within[0]) for test in (pa.types.is_binary, pa.types.is_large_binary)):
            raise UserError(f"data.image_column={spec.image}: in {self.name} of {spec.where} it holds {kind}, not the bytes of "
                            f"image files; the columns are {', '.join(table.column_names)}")
        labels = rows[spec.label].to_pylist() if spec.label else [None] * len(rows)
        records = zip(rows[spec.image].to_pylist(), labels, strict=True)
        names = (f"row {first + start + i * step} of {self.name}" for i in range(len(rows)))
        return [Record(name, self._content(image, name), label) for name, (image, label) in zip(names, records, strict=True)]

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


class Group(NamedTuple):
    """Members of an archive that share a key: the byte of the first one, and what they are by extension (lower case)."""

    key: str
    offset: int
    members: dict[str, bytes | tarfile.TarInfo]

    @property
    def image(self) -> str | None:
        """The extension of the image."""
        return next((extension for extension in self.members if f".{extension}" in image_endings()), None)


@dataclass(frozen=True)
class TarShard(Shard):
    """A WebDataset: members `key.jpg` (or another image format) and `key.cls` or `key.json` stand beside each other."""

    name: str
    size: int
    spec: ImageSpec
    file: SourceFile

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1, at: At | None = None) -> Iterator[Row]:
        offset, first = at or (0, 0)
        theirs = (tarfile.TarError, OSError, EOFError, zlib.error)
        streamed = not self.file.seekable
        mode = "r|" if streamed else "r:"
        try:
            with self.file.open(offset) as file, closing(tarfile.open(fileobj=file, mode=mode)) as archive:
                for row, group in enumerate(_groups(archive, streamed), first):
                    if row >= start and row % modulus == residue:
                        begin = group.offset + (offset if streamed else 0)
                        yield Row(row, self._record(archive, group), [begin, row])
        except theirs as error:
            raise UserError(f"{self.spec.where}: {self.name} is damaged or not what its name says ({type(error).__name__}: "
                            f"{error}); mend or remove it") from None

    def _record(self, archive: tarfile.TarFile, group: Group) -> Record:
        content = {name: value if isinstance(value, bytes) else archive.extractfile(value).read()
                   for name, value in group.members.items()
                   if name == group.image or (self.spec.label and name in ("cls", "json"))}
        return Record(f"{group.key} of {self.name}", content[group.image], self._label(content, group.key))

    def _label(self, content: dict[str, bytes], key: str) -> Label:
        if "cls" in content:
            text = content["cls"].decode(errors="replace").strip()
            return int(text) if text.isdecimal() else text
        if "json" not in content:
            return None
        try:
            fields = json.loads(content["json"])
        except ValueError as error:
            raise UserError(f"{self.spec.where}: {key}.json of {self.name} is no JSON ({error}); mend it") from None
        label = fields.get(self.spec.label) if isinstance(fields, dict) else None
        return label if isinstance(label, (int, str)) else None


def _groups(archive: tarfile.TarFile, streamed: bool) -> Iterator[Group]:
    """The samples of an archive: only those with an image. Links and devices are no files, and nothing is ever unpacked.

    Where the archive is streamed, what was stepped over is gone: members are read at once.
    """
    group: Group | None = None
    for member in archive:
        archive.members = []  # tarfile keeps a list of all it has seen
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not member.isfile() or not stem:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if group is None or group.key != key:
            if group and group.image:
                yield group
            group = Group(key, member.offset, {})
        group.members[extension.lower()] = archive.extractfile(member).read() if streamed else member
    if group and group.image:
        yield group


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
        return [shard_of(SourceFile.local(root / file.name, spec.where), as_utf8(file.name), spec)
                for file in found.of(SHARD)]
    except OSError as error:
        raise UserError(f"{spec.where}: cannot be read ({error}); mend or remove it") from None
