"""Data sources of installed packages: `data.source` names one, and text and image families read its rows as they read a file's.

A package offers a source as an entry point of the group `genscale.data`: a dataclass that inherits from `RowSource`, whose
fields are what `data.options` may set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from genscale.data.file_tables import ROWS, At, Rows
from genscale.data.json_values import Values, column_of
from genscale.data.shard import ShardOfTables
from genscale.data.spec import SOURCES, TOOLS, Spec, is_installed
from genscale.errors import UserError
from genscale.settings.parser import settings_of


class RowSource:
    """Rows of one's own making as the data of text and image families, through the same columns, filters, tokenizers, caches
    and validation sets as a JSONL or parquet file: same samples at any number of processes, exact resume.

    Subclass it as a dataclass, whose fields are the settings that `data.options` has, and name the class in an entry point of
    the group `genscale.data`. It is made anew, and pickled into other processes, so that it opens things in `rows` alone.

    Example:
        >>> from dataclasses import dataclass
        >>> from genscale.data.row_source import RowSource
        >>> @dataclass
        ... class Sums(RowSource):
        ...     "Sums of two numbers, a shard for each first one."
        ...
        ...     most: int = 9
        ...     "The largest number."
        ...
        ...     def shards(self):
        ...         return [f"{number}" for number in range(self.most + 1)]
        ...
        ...     def rows(self, shard):
        ...         for other in range(self.most + 1):
        ...             yield {"text": f"{shard} + {other} = {int(shard) + other}"}
        >>> next(Sums(most=3).rows("2"))
        {'text': '2 + 0 = 2'}
    """

    def shards(self) -> Sequence[str]:
        """The names of the shards, in a fixed order. A resume reads a shard from its beginning, and a large source is read
        fastest in as many shards as there are lanes (`data.lanes`)."""
        raise NotImplementedError

    def rows(self, shard: str) -> Iterable[Mapping[str, Any]]:
        """The rows of a shard from its first one on: the same, in the same order, whenever it is called. Of text, a row has
        the column `data.column` (or those of pairs or conversations); of images `data.image_column`, the bytes of an image
        file, and `data.label_column`. Others are there for `data.filters`. None stands for what a row lacks."""
        raise NotImplementedError

    def validation_shards(self) -> Sequence[str]:
        """Names of further shards to validate on. Without any, rows of the others are held out."""
        return ()

    def fingerprint(self) -> str:
        """What tells these rows from others in shards of the same names, as a version or a date: a run does not go on where it
        has changed. Without one, first rows are compared (of what fits into memory, all of them)."""
        return ""


def sources_in(data: Any) -> list[str]:
    """The values of a `data` section that may name an installed source."""
    entries = getattr(data, "sources", None)
    given = [*(entry.get("source") if isinstance(entry, Mapping) else entry.source
               for entry in (entries if isinstance(entries, list) else [])),
             *([] if entries else [getattr(data, "source", None)]), getattr(data, "validation_source", None)]
    names = [name for value in given for name in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and re.fullmatch(r"[\w-]+", name)))


def open_installed(spec: Spec) -> RowSource | None:
    """The installed source that is meant; None where it is a file or a hub dataset.

    Raises:
        UserError: a path has the name too, the options are wrong, or it cannot be loaded.
    """
    if not is_installed(spec.name):
        return None
    if Path(spec.name).exists():
        raise UserError(f"{spec.key}={spec.name}: is a source of the installed package {SOURCES.package(spec.name)}, and a "
                        f"path here; give ./{spec.name} for the path, or rename it")
    return settings_of(SOURCES.load_class(spec.name, RowSource), spec.options, spec.setting("options"))


def shard_names(source: RowSource, spec: Spec) -> tuple[list[str], list[str]]:
    """The names of the shards to train on, and of those to validate on.

    Raises:
        UserError: there is none, some are no names or come twice, or rows are others whenever they are read.
    """
    training, validation = list(source.shards()), list(source.validation_shards())
    names = [*training, *validation]
    if not training or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise SOURCES.unfit(spec.name, f"has the shards {training!r:.200} and {validation!r:.200}; they must be names, "
                            "at least one of them to train on, and each another")
    if first_row(source, training[0], spec) != first_row(source, training[0], spec):
        raise SOURCES.unfit(spec.name, f"has other rows whenever shard '{training[0]}' is read (it may draw random numbers, "
                            "or be an iterator that is read up), so that a run could not be resumed")
    return training, validation


def first_row(source: RowSource, shard: str, spec: Spec) -> str:
    """A digest of what is wanted of a shard's first row."""
    rows = [{name: row.get(name) for name in spec.columns} for row in islice(_rows(source, shard, spec), 1)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def row_tables(source: RowSource, shard: str, spec: Spec, start: int) -> Iterator[Rows]:
    """The rows of a shard as tables, from that on in which row `start` is.

    Raises:
        UserError: the first rows have not the columns that are asked for, or are no mappings.
    """
    first = start - start % ROWS
    rows = islice(_rows(source, shard, spec), first, None)
    while held := list(islice(rows, ROWS)):
        names = list(dict.fromkeys(name for row in held for name in row))
        if first == 0 and set(spec.columns) - {*names, *([spec.tools] if spec.tools == TOOLS else [])}:
            raise spec.unknown_columns(f"shard '{shard}'", names) or UserError(f"{spec.key}={spec.name}: lacks columns")
        yield Rows(first, None, Values({name: column_of(held, name) for name in spec.columns}, names, False))
        first += len(held)


def _rows(source: RowSource, shard: str, spec: Spec) -> Iterator[Any]:
    for number, row in enumerate(source.rows(shard)):
        if not isinstance(row, Mapping):
            raise SOURCES.unfit(spec.name, f"gives {row!r:.80} as row {number} of shard '{shard}', and that is no "
                                "mapping of columns")
        yield row


@dataclass(frozen=True)
class SourceShard(ShardOfTables):
    """A shard of an installed source."""

    name: str
    spec: Spec
    source: RowSource
    size: int = 0

    def _tables(self, start: int, at: At | None) -> Iterator[Rows]:
        return row_tables(self.source, self.name, self.spec, start)

    @property
    def fingerprint(self) -> str:
        """What tells its rows from others under the same name."""
        return self.source.fingerprint() or first_row(self.source, self.name, self.spec)
