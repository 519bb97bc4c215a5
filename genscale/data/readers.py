"""Shards of documents behind one face: texts that Python brings, local files, URLs and Hugging Face hub datasets.

Which row goes where is decided in `genscale.data.text.sources`. Hub datasets are read through `datasets`.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from genscale.data.file_tables import ROWS, At, Rows, json_rows, open_parquet, parquet_rows, text_rows, text_values
from genscale.data.folders import File, identity, parted, refuse_no_file, say_repeated, unreadable, walk
from genscale.data.json_values import BadRow
from genscale.data.locations import (
    READABLE,
    builder_of,
    find_urls,
    hub_revision,
    is_plain_parquet,
    is_silence,
    open_hub,
)
from genscale.data.made_sums import sums
from genscale.data.python_texts import TEXTS
from genscale.data.row_source import SourceShard, open_installed, shard_names
from genscale.data.shard import Shard, ShardOfTables
from genscale.data.source_file import SourceFile, TooLarge, is_url
from genscale.data.spec import SUMS, TOOLS, Spec
from genscale.data.web import AGAIN
from genscale.errors import SourceLost, UserError, as_utf8, nearest
from genscale.masking import masked

__all__ = ["MadeShard", "Shard", "SourceShard", "Spec", "TableShard", "damaged", "find_shards", "in_parts", "known_size",
           "parted_shards", "place", "split"]


@dataclass(frozen=True)
class MadeShard(ShardOfTables):
    """What needs no file: a text that every Python brings, one document a topic or module; or made sums."""

    name: str
    spec: Spec
    size: int = 0
    held_out: bool = False

    def _tables(self, start: int, at: At | None) -> Iterator[Rows]:
        made = self.spec.name
        yield Rows(0, None, text_values(TEXTS[made]()) if made in TEXTS else sums(self.held_out))


@dataclass(frozen=True)
class TableShard(ShardOfTables):
    """One of the `count` parts of a file, or of a hub dataset where there is no file. Holds nothing open, so that it travels to
    worker processes."""

    name: str
    size: int
    spec: Spec
    file: SourceFile | None = None
    part: tuple[int, int] = (0, 1)

    def _tables(self, start: int, at: At | None) -> Iterator[Rows]:
        try:
            yield from self._file_tables(start, at) if self.file else self._hub_tables()
        except UserError:
            raise
        except Exception as error:
            raise damaged(self, error) from None

    def _file_tables(self, start: int, at: At | None) -> Iterator[Rows]:
        assert self.file is not None
        builder = builder_of(self.file.path)
        if builder == "parquet":
            group = self.part[0] if self.part[1] > 1 else None
            return parquet_rows(self.file, self.spec.columns, self.check_columns, group, self.spec.max_record_bytes, start)
        if builder == "json":
            return json_rows(self.file, self.spec.columns, self.check_columns, self.spec.max_record_bytes, at,
                             self.spec.tools if self.spec.tools == TOOLS else None)
        self.check_columns(["text"])
        return text_rows(self.file, self.spec.document, self.spec.max_record_bytes, at)

    def check_columns(self, names: list[str]) -> None:
        """Refuse a file without the columns that are asked for. Raises UserError."""
        if error := self.spec.unknown_columns(self.name, names):
            raise error

    def open(self) -> Any:
        """The `datasets` stream of the hub dataset that this is a part of."""
        return open_hub(self.spec)

    def _hub_tables(self) -> Iterator[Rows]:
        stream = self.open()
        index, count = self.part
        if count > stream.num_shards:
            stream = stream.reshard()
        first = 0
        for table in stream.shard(num_shards=count, index=index).with_format("arrow").iter(batch_size=ROWS):
            yield Rows(first, None, table)
            first += len(table)


def damaged(shard: TableShard, error: Exception) -> Exception:
    """What reading the shard failed of, as the user's mistake where it can be one, or the error itself."""
    import datasets
    import pyarrow as pa
    import zstandard

    reason = f"({error})" if isinstance(error, BadRow) else f"({type(error).__name__}: {error}"[:300] + ")"
    where = f"{shard.spec.key}={shard.spec.name}: "
    if isinstance(error, TooLarge):
        higher = "set data.max_record_bytes higher, or divide it" if type(shard.spec) is Spec else "decompress it"
        return UserError(f"{where}{shard.name}: {error}; if that is meant, {higher}")
    if isinstance(error, OSError) and "requires too much memory" in str(error):  # as zstd says it
        return UserError(f"{where}{shard.name}: its zstd window is larger than the 128 MiB that are decompressed; compress it "
                         "again without --long, or with --long=27 at most")
    if shard.file is None and is_silence(error):
        return SourceLost(f"{where}reading {shard.name} broke off: the hub does not answer {reason}; start again when it does: "
                          f"{AGAIN}")
    theirs = (pa.ArrowException, ValueError, OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error, zstandard.ZstdError,
              datasets.exceptions.DatasetsError)
    if not isinstance(error, theirs):
        return error
    return UserError(f"{where}{shard.name} is damaged or not what its name says {reason}; mend or remove it")


def find_shards(spec: Spec, at_least: int) -> list[Shard]:
    """The shards of a source to train on, in a fixed order; see `parted_shards`.

    Args:
        spec: what to read.
        at_least: see `in_parts`.

    Raises:
        UserError: nothing there, nothing readable, or the server or the hub does not answer.
    """
    return in_parts(parted_shards(spec)[0], at_least)


def in_parts(shards: list[Shard], at_least: int) -> list[Shard]:
    """The shards; where they are fewer than `at_least`, parquet files by row groups, and a hub dataset by its files."""
    return shards if len(shards) >= at_least else [part for shard in shards for part in split(shard, at_least)]


def parted_shards(spec: Spec) -> tuple[list[Shard], list[Shard]]:
    """The shards to train on, and those to validate on where the names in a folder tell such from the others.

    Raises:
        UserError: as of `find_shards`.
    """
    if not spec.locations:
        return (_url_shards(spec, [spec.name]), []) if is_url(spec.name) else _shards(spec)
    say_repeated(spec.locations, spec.key)
    if all(map(is_url, spec.locations)):
        return _url_shards(spec, spec.locations), []
    found = [[[replace(cast(Any, shard), name=f"{number}:{shard.name}") for shard in side]
              for side in parted_shards(replace(spec, name=name, locations=()))] for number, name in enumerate(spec.locations)]
    training, validation = zip(*found, strict=True)
    return list(chain.from_iterable(training)), list(chain.from_iterable(validation))


def _url_shards(spec: Spec, urls: Sequence[str]) -> list[Shard]:
    for url in urls:
        if builder_of(url) is None:
            raise UserError(f"{spec.key}={url}: files of this kind are not read{READABLE}")
    # A token in an address is no part of what it leads to: a run may go on with another.
    return [TableShard(masked(file.path), file.size, spec, file) for file in find_urls(spec, urls)]


def _shards(spec: Spec) -> tuple[list[Shard], list[Shard]]:
    if spec.name in TEXTS:
        return [MadeShard(spec.name, spec)], []
    if spec.name == SUMS:
        return [MadeShard(SUMS, spec)], [MadeShard(f"{SUMS}-held-out", spec, held_out=True)]
    if (source := open_installed(spec)) is not None:
        training, validation = shard_names(source, spec)
        return [SourceShard(name, spec, source) for name in training], [SourceShard(name, spec, source) for name in validation]
    path = Path(spec.name).expanduser()
    if path.is_dir():
        return _folder_shards(spec, path)
    if path.exists():
        return _file_shards(spec, path.parent, [File(path.name, -1, "", 0)]), []
    if builder_of(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec.name):
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"{spec.key}={spec.name}: there is no such file or folder{near}; give an existing one, a URL "
                        "(https://...), a hub name, python-stdlib, python-docs or sums")
    spec = replace(spec, revision=hub_revision(spec))
    return [TableShard(f"{spec.name}@{spec.revision}", 0, spec)], []


def _folder_shards(spec: Spec, root: Path) -> tuple[list[Shard], list[Shard]]:
    where = f"{spec.key}={spec.name}"
    found = walk(root, builder_of, where)
    if not found.files:
        raise UserError(f"{where}: the folder holds no file that is read{READABLE}; {found.rest() or 'it is empty'}")
    found.say()
    training, validation = parted(found.files, where)
    return _file_shards(spec, root, training), _file_shards(spec, root, validation)


def _file_shards(spec: Spec, root: Path, files: Sequence[File]) -> list[Shard]:
    where = f"{spec.key}={spec.name}"
    found, refused = [], []
    for name in (file.name for file in files):
        refuse_no_file(root / name, where)
        if builder_of(name) is None:
            raise UserError(f"{where}: files of this kind are not read{READABLE}")
        try:
            found.append((as_utf8(name), SourceFile.local(root / name, where)))
        except OSError as error:
            refused.append(error)
    if refused:
        raise unreadable(where, refused)
    # An empty file holds no document.
    return [TableShard(name, file.size, spec, file) for name, file in found if file.size]


def place(shard: Shard) -> Any:
    """The same for shards that are read from one file, by whatever path; or from one URL, or one split of a hub dataset."""
    file = getattr(shard, "file", None)
    if isinstance(shard, MadeShard):
        return shard.spec.name, shard.held_out
    if isinstance(shard, SourceShard):
        return shard.spec.name, repr(shard.source), shard.name
    if file is None:
        return shard.name, shard.spec.subset, shard.spec.split
    return file.path if is_url(file.path) else identity(file.path)


def split(shard: Shard, at_least: int) -> list[Shard]:
    """A shard in the parts that can be opened by themselves: a hub dataset's files, a parquet file's row groups."""
    if not isinstance(shard, TableShard) or (shard.file is not None and not is_plain_parquet(shard.file.path)):
        return [shard]
    try:
        if shard.file is not None:
            with open_parquet(shard.file, shard.spec.max_record_bytes) as opened:
                shard.check_columns(opened.schema_arrow.names)
                count = max(1, opened.num_row_groups)
        else:
            stream = shard.open()
            count = stream.num_shards
            if count < at_least:
                count = stream.reshard().num_shards
    except UserError:
        raise
    except Exception as error:
        raise damaged(shard, error) from None
    return [replace(shard, name=f"{shard.name}#{i}" if count > 1 else shard.name, size=shard.size // count, part=(i, count))
            for i in range(count)]


def known_size(shards: Sequence[Shard]) -> int | None:
    """Bytes of the source, as far as they are known without reading it; None where part of it has no known size."""
    total = 0
    for shard in shards:
        size = shard.size
        if isinstance(shard, TableShard) and shard.file is None:
            splits = shard.open().info.splits or {}
            size = splits[shard.spec.split].num_bytes if shard.spec.split in splits else 0
        if not size and isinstance(shard, TableShard):
            return None
        total += size
    return total
