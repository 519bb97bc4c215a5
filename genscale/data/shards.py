"""Shards of documents behind one face: texts that Python brings, and tables in local files, at URLs and on the Hugging Face
hub, which is read through `datasets`."""

from __future__ import annotations

import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from genscale.data.columns import documents
from genscale.data.file_tables import ROWS, At, Rows, json_rows, parquet_rows, text_rows, text_values
from genscale.data.json_values import BadRow
from genscale.data.locations import builder_of, is_silence, open_hub
from genscale.data.python_texts import TEXTS
from genscale.data.source_file import SourceFile, TooLarge
from genscale.data.spec import TOOLS, Spec
from genscale.data.web import AGAIN
from genscale.errors import SourceLost, UserError


class Row(NamedTuple):
    """A document, its number in the shard, and where to begin in order to reach it again (small, JSON; None: at the start)."""

    number: int
    document: Any
    at: At | None


class Shard(ABC):
    """A run of documents read from front to back.

    Attributes:
        name: unique in the source, the same on every machine.
        size: bytes on disk, or 0 where unknown.
        spec: what it is a part of.
    """

    name: str
    size: int
    spec: Spec

    @abstractmethod
    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1, at: At | None = None) -> Iterator[Row]:
        """The rows from `start` on that are `residue` modulo `modulus`; rows without text, and those that a filter leaves out,
        do not appear.

        Args:
            at: what came with row `start` another time: where to begin, so that nothing far before it is read.

        Raises:
            UserError: damaged file, no such column or one of another type, an empty answer.
        """


@dataclass(frozen=True)
class PythonShard(Shard):
    """A text that every Python brings, one document a topic or module."""

    name: str
    spec: Spec
    size: int = 0

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1, at: At | None = None) -> Iterator[Row]:
        texts = text_values(TEXTS[self.spec.name]())
        wanted = start + (residue - start) % modulus
        for row, text in zip(range(wanted, len(texts), modulus), documents(texts, self.spec, self.name, 0, wanted, modulus),
                             strict=True):
            if text is not None:
                yield Row(row, text, None)


@dataclass(frozen=True)
class TableShard(Shard):
    """One of the `count` parts of a file, or of a hub dataset where there is no file. Holds nothing open, so that it travels to
    worker processes."""

    name: str
    size: int
    spec: Spec
    file: SourceFile | None = None
    part: tuple[int, int] = (0, 1)

    def rows(self, start: int = 0, residue: int = 0, modulus: int = 1, at: At | None = None) -> Iterator[Row]:
        for first, place, table in self._tables(start, at):
            wanted = max(start - first, 0)
            wanted += (residue - first - wanted) % modulus
            if wanted < len(table):
                texts = self.documents(table, first, wanted, modulus)
                for row, text in zip(range(wanted, len(table), modulus), texts, strict=True):
                    if text is not None:
                        yield Row(first + row, text, place)

    def documents(self, table: Any, first: int, start: int, step: int) -> list[Any]:
        """What the rows `start::step` of a table hold; None for one to leave out. `first` is the number of its first row."""
        return documents(table, self.spec, self.name, first, start, step)

    def _tables(self, start: int, at: At | None) -> Iterator[Rows]:
        """The rows, an Arrow table at a time; tables that end before `start` may be left out."""
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
