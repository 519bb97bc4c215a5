"""A run of documents behind one face, whatever they are read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from genscale.data.columns import documents
from genscale.data.file_tables import At, Rows
from genscale.data.spec import Spec


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


class ShardOfTables(Shard):
    """A shard that is read a table at a time."""

    @abstractmethod
    def _tables(self, start: int, at: At | None) -> Iterator[Rows]:
        """The rows, a table at a time; tables that end before `start` may be left out."""

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
