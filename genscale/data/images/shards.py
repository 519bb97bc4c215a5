"""WebDataset tars of images, local or by URL, as shards of records; and which files of a folder are shards."""

from __future__ import annotations

import json
import logging
import re
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from genscale.data.file_tables import At
from genscale.data.folders import TRAINING, VALIDATION, Folder, examples, walk
from genscale.data.images.labels import Label, label_of
from genscale.data.images.spec import ImageSpec, Record, image_endings
from genscale.data.images.tables import ImageTableShard
from genscale.data.images.tars import LABEL_BYTES, LABELS, Archive, CheckedInfo, Group
from genscale.data.shard import Row, Shard
from genscale.data.source_file import SourceFile, TooLarge
from genscale.errors import UserError, as_utf8, nearest

IMAGE, SHARD, ARRAYS = "image", "shard", "arrays"
"""Kinds of files that are looked for in a folder."""
TAR_FILES = (".tar", ".tar.gz", ".tgz")
INTEGER = re.compile(r"[+-]?\d{1,18}")

log = logging.getLogger("genscale")


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
