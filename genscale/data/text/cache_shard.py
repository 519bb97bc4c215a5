"""The cached tokens of one shard: segments that any number of processes append to, each its own, and the index over them.

A segment is two files: `NAME.tokens` holds token ids end to end, `NAME.index` a record of fixed size for every piece. Tokens
reach the disk before the records that point at them, and a record cut off by a kill is no whole record: what a reader finds is
right. `NAME.ends` notes which parts of the shard were read to their end, so that they need not be opened again.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from genscale.data.windows import Part

RECORD = np.dtype([("row", "<u8"), ("start", "<u8"), ("piece", "<u4"), ("length", "<u4"), ("bytes", "<u4"), ("mark", "<u4")])
MARK = 0x67730000
"""In every record, plus 1 for a document's last piece: a page of zeros left by a crash of the machine is no record."""
IN_MEMORY = 2**18
"""Bytes up to which a segment is read into memory: each one mapped holds a file descriptor."""


class _Allowance:
    """Seconds that this process may spend on looking again, at all its shards together: a twentieth of the time that passes,
    of which no more than `SAVED` is saved up."""

    SHARE, SAVED = 0.05, 2.0

    def __init__(self) -> None:
        self._left, self._at = self.SAVED, time.monotonic()

    def left(self) -> float:
        now = time.monotonic()
        self._left, self._at = min(self.SAVED, self._left + self.SHARE * (now - self._at)), now
        return self._left

    def spend(self, seconds: float) -> None:
        self._left -= seconds


LOOKING = _Allowance()


class Buffer(Protocol):
    """Tokens of a segment: bytes, or a file in memory. Not an array: a slice of bytes costs a fifth of a slice of an array, and
    pieces are short."""

    def __getitem__(self, part: slice, /) -> bytes: ...


class Found(NamedTuple):
    """Pieces of documents asked for.

    Attributes:
        document: int64 `(pieces,)`, increasing: which of those asked for.
        number: int64 `(pieces,)`, of the piece in its document.
        low, high: int64 `(pieces,)`, its bytes in its file.
        file: int64 `(pieces,)`, which of `files` it is in.
        files: the segments' tokens, open: nothing that happens to the folder later can come between.
        complete: bool `(documents,)`: all pieces of it are there.
    """

    document: np.ndarray
    number: np.ndarray
    low: np.ndarray
    high: np.ndarray
    file: np.ndarray
    files: list[Buffer]
    complete: np.ndarray


@dataclass
class ShardIndex:
    """What is cached of a shard, as last looked at. Raises OSError where the folder cannot be read."""

    folder: Path
    token: np.dtype
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._buffers: dict[int, Buffer] = {}
        self._answers: dict[Part, np.ndarray | None] = {}  # every lane asks, and asks again each epoch
        self._loaded_at = 0.0
        self._index(np.empty(0, RECORD), np.empty(0, np.int64))

    def refresh(self, least: float) -> None:
        """Look again, but not within `least` seconds of the last time, nor when this process has looked for too long."""
        started, first = time.monotonic(), not self._loaded_at
        if started - self._loaded_at < least or (not first and LOOKING.left() <= 0):
            return
        self._loaded_at = started
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)} if self.folder.is_dir() else {}
        if sizes != self._seen:
            self._seen = sizes
            self._load(sizes)
        self._loaded_at = time.monotonic()
        if not first:
            LOOKING.spend(self._loaded_at - started)

    def _load(self, sizes: dict[str, int]) -> None:
        # New ones behind the old ones: numbers that were given out keep their meaning.
        self.names += sorted({name.removesuffix(".index") for name in sizes if name.endswith(".index")} - set(self.names))
        loaded, segments = [], []
        for number, name in enumerate(self.names):
            if f"{name}.index" not in sizes:
                continue
            records = np.fromfile(self.folder / f"{name}.index", RECORD)
            size = sizes.get(f"{name}.tokens", 0) // self.token.itemsize
            right = (records["mark"] & ~np.uint32(1) == MARK) & (records["start"] + records["length"] <= size)
            loaded.append(records[right])
            segments.append(np.full(int(right.sum()), number))
        self._buffers = {}
        records = np.concatenate([*loaded, np.empty(0, RECORD)])
        numbers = np.concatenate([*segments, np.empty(0, np.int64)])
        order = np.lexsort((records["piece"], records["row"]))
        records, numbers = records[order], numbers[order]
        if len(records):  # two processes may both have written a piece
            new = np.r_[True, (np.diff(records["row"]) != 0) | (np.diff(records["piece"]) != 0)]
            records, numbers = records[new], numbers[new]
        self._answers = {}
        self._index(records, numbers)

    def _index(self, records: np.ndarray, segments: np.ndarray) -> None:
        """Columns over pieces in the order of (row, piece), and over the rows that have any."""
        self.totals = {"tokens": int(records["length"].sum()), "bytes": int(records["bytes"].sum())}
        self._segments, self._numbers = segments, records["piece"].astype(np.int64)
        self._low = records["start"].astype(np.int64) * self.token.itemsize
        self._high = self._low + records["length"].astype(np.int64) * self.token.itemsize
        self._rows, self._firsts = np.unique(records["row"].astype(np.int64), return_index=True)
        self._counts = np.diff(np.r_[self._firsts, len(records)])
        lasts = records[self._firsts + self._counts - 1]
        self._complete = (lasts["mark"] == MARK + 1) & (lasts["piece"] == self._counts - 1)
        self._table = None
        if len(self._rows) and self._rows[-1] < 4 * len(self._rows):  # looked up in a tenth of the time of a search
            self._table = np.full(self._rows[-1] + 1, -1)
            self._table[self._rows] = np.arange(len(self._rows))

    def rows(self, part: Part | None = None) -> np.ndarray:
        """The rows of complete documents, increasing."""
        rows = self._rows[self._complete]
        return rows if part is None else rows[rows % part.modulus == part.residue]

    def find(self, rows: np.ndarray) -> Found:
        """The pieces of the documents in those rows. Raises OSError where the tokens are gone."""
        complete = np.zeros(len(rows), bool)
        documents = np.arange(len(rows))
        at = self._position(rows)
        if (at < 0).any():
            documents = np.flatnonzero(at >= 0)
            at = at[documents]
        complete[documents] = self._complete[at]
        counts = self._counts[at]
        firsts = np.repeat(self._firsts[at] - np.cumsum(counts) + counts, counts)
        flat = firsts + np.arange(len(firsts))
        used = np.flatnonzero(np.bincount(self._segments[flat]))
        files = np.zeros(len(self.names), np.int64)
        files[used] = np.arange(len(used))
        return Found(np.repeat(documents, counts), self._numbers[flat], self._low[flat], self._high[flat],
                     files[self._segments[flat]], [self._open(segment) for segment in used.tolist()], complete)

    def _position(self, rows: np.ndarray) -> np.ndarray:
        """Where each row stands in `_rows`, or -1."""
        if not len(self._rows):
            return np.full(len(rows), -1)
        if self._table is not None:
            return np.where(rows < len(self._table), self._table[np.minimum(rows, len(self._table) - 1)], -1)
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        return np.where(self._rows[at] == rows, at, -1)

    def _open(self, segment: int) -> Buffer:
        if segment not in self._buffers:
            path = self.folder / f"{self.names[segment]}.tokens"
            size = self._seen.get(path.name, 0) // self.token.itemsize * self.token.itemsize
            with open(path, "rb") as file:
                small = size <= IN_MEMORY
                self._buffers[segment] = file.read(size) if small else mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return self._buffers[segment]

    def training_rows(self, part: Part) -> np.ndarray | None:
        """All training rows of the part, where the shard was once read to its end and every one of them is here."""
        if part not in self._answers:
            self._answers[part] = self._training_rows(part)
        return self._answers[part]

    def _training_rows(self, part: Part) -> np.ndarray | None:
        for modulus, parts in self._ends(self._seen).items():
            step = np.gcd(modulus, part.modulus)
            needed = [residue for residue in range(modulus) if residue % step == part.residue % step]
            if all(parts.get(residue) == self.end(Part(part.shard, residue, modulus)) for residue in needed):
                return self.rows(part)
        return None

    def end(self, part: Part) -> dict[str, int]:
        """What is noted of a part that was read to its end: enough to notice that some of it was lost since."""
        rows = self.rows(part)
        return {"documents": len(rows), "sum": int(rows.sum())}

    def ended(self) -> bool:
        """Whether all of the shard was once read to its end, by the notes alone."""
        return any(len(parts) == modulus for modulus, parts in self._ends(self._names()).items())

    def text_bytes(self) -> int:
        """Bytes of text that the pieces come from, by the records alone: nothing is sorted."""
        files = (self.folder / name for name in self._names() if name.endswith(".index"))
        return sum(int(np.fromfile(file, RECORD)["bytes"].sum()) for file in files)

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if self.folder.is_dir() else []

    def _ends(self, names: Iterable[str]) -> dict[int, dict[int, dict[str, int]]]:
        """modulus -> residue -> what was noted."""
        ends: dict[int, dict[int, dict[str, int]]] = {}
        for name in names:
            if name.endswith(".ends"):
                # A line without its end was cut off; one of zeros was left by a crash of the machine.
                for line in (self.folder / name).read_text(errors="replace").split("\n")[:-1]:
                    with suppress(ValueError):
                        end = json.loads(line)
                        ends.setdefault(end.pop("modulus"), {})[end.pop("residue")] = end
        return ends
