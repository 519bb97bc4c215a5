"""metrics.jsonl: the record of a run that is always written, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.reading import MAX_JSON_BYTES, Unreadable, open_plain, parse_json
from genscale.writing import drafted, no_link

_OURS = re.compile(rb'\{"step": (\d{1,18})[,}]')
"""How a line begins that `MetricsFile` has written."""
_VALIDATION_LOSS = re.compile(rb'"validation_loss": (-?[0-9][-+.0-9e]*)[,}]')


def _plain(value: Any) -> Any:
    """A JSON value that reads back equal; NaN and infinities become null, for JSON has no such numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    number = float(value)  # also of NumPy and one-element tensors; fp32 to double is exact, and json writes repr
    return number if math.isfinite(number) else None


def _parse(line: bytes) -> dict[str, Any]:
    """The record in a line. Raises Unreadable."""
    record = parse_json(line.decode(errors="replace"))
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**63:
        raise Unreadable("not a JSON object with a step")
    return record


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, place in the file, line) of every line that says something. Raises UserError."""
    try:
        with open_plain(path) as file:
            place = number = 0
            while line := file.readline(MAX_JSON_BYTES + 1):
                number += 1
                if len(line) > MAX_JSON_BYTES:
                    raise Unreadable(f"has more than {MAX_JSON_BYTES:,} bytes in line {number}")
                if line.strip():
                    yield number, place, line
                place += len(line)
    except Unreadable as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _damaged(path: Path, number: int, why: Unreadable) -> UserError:
    return UserError(f"{path}: line {number} is damaged ({why}); delete that line to go on")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order; empty for a missing file.

    Raises:
        UserError: a line other than a torn last one is not a JSON object with a step.
    """
    path = Path(path)
    records = []
    for number, _, line in _lines(path) if path.exists() else ():
        try:
            records.append(_parse(line))
        except Unreadable as error:
            if line.endswith(b"\n"):  # else it was cut short by a kill or a full disk
                raise _damaged(path, number, error) from None
    return records


def read_some_metrics(path: str | Path, most: int) -> list[dict[str, Any]]:
    """Records for a picture, in file order: of those with a validation and of the others at most `most` each (and the best
    validation loss), evenly spread; damaged lines are left out. Empty for a missing file."""
    path = Path(path)
    if not path.exists():
        return []
    places = {True: array("Q"), False: array("Q")}
    best, lowest = [], math.inf
    for _, place, line in _lines(path):
        if not line.endswith(b"\n"):
            continue
        is_validation = b'"validation_' in line
        places[is_validation].append(place)
        if is_validation and (found := _VALIDATION_LOSS.search(line)) and float(found[1]) < lowest:
            best, lowest = [place], float(found[1])
    chosen = sorted({*_spread(places[True], most), *_spread(places[False], most), *best})
    records = []
    with open_plain(path) as file:
        for place in chosen:
            file.seek(place)
            with contextlib.suppress(Unreadable):
                records.append(_parse(file.readline()))
    return records


def _spread(places: Sequence[int], most: int) -> Sequence[int]:
    """The first, the last, and one out of each of equal stretches: not always the same of them, for what is logged every other
    step would be chosen always or never."""
    if len(places) <= most:
        return places
    draw = random.Random(0)
    edges = [index * len(places) // most for index in range(most + 1)]
    return [places[0], *(places[draw.randrange(*pair)] for pair in pairwise(edges)), places[-1]]


class MetricsFile:
    """Appends records to metrics.jsonl so that whatever kills the run leaves whole lines.

    Floats are written as repr writes them (they read back bit for bit); NaN and infinities are written as null.
    Opening a file that ends in a torn line mends it.

    Raises:
        OSError: the file cannot be written (a full disk leaves the whole lines before it).
        UserError: an existing file is damaged, a link or no plain file, or none can be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting = b""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.path.parent} ({error.strerror}); set --run.dir to another "
                            "folder") from None
        with open_plain(self.path) as file:
            is_whole = not file.seek(0, os.SEEK_END) or (file.seek(-1, os.SEEK_END), file.read())[1] == b"\n"
        if not is_whole:
            self.drop(lambda record: False, since=2**63)

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line `{"step": step, **metrics}`; it is with the operating system on return, so SIGKILL cannot lose it.

        Lines that a full disk did not take are kept, and written before the next."""
        record = {"step": int(step)} | {key: _plain(value) for key, value in metrics.items()}
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._write_waiting()

    def _write_waiting(self) -> None:
        lines = memoryview(self._waiting)
        whole = os.fstat(self._descriptor).st_size
        try:
            while lines:  # a write may be short
                lines = lines[os.write(self._descriptor, lines) :]
        except OSError:
            os.ftruncate(self._descriptor, whole)
            raise
        self._waiting = b""

    def truncate_after(self, step: int) -> None:
        """Drop the lines with a step beyond `step`, which a resumed run is about to write again. Atomic: all or nothing."""
        self.drop(lambda record: True, since=step + 1)

    def drop(self, dropped: Callable[[Mapping[str, Any]], bool], since: int) -> None:
        """Drop the records from the step `since` on of which it is true, and a torn line. Atomic: all or nothing.

        Raises:
            UserError: a line is damaged.
            OSError: the file cannot be written.
        """
        waiting = b"".join(line for line in self._waiting.splitlines(keepends=True)
                           if (record := json.loads(line))["step"] < since or not dropped(record))
        cut: int | None = None  # where the first that goes begins
        kept: list[bytes] = []  # what stays after it
        for number, place, line in _lines(self.path):
            stays, whole = self._stays(number, line, dropped, since), line.endswith(b"\n")
            if cut is None and not (stays and whole):
                cut = place
            if cut is not None and stays:
                kept.append(line if whole else line + b"\n")
        if cut is not None and kept:
            self._rewrite(cut, kept)
        elif cut is not None:
            os.ftruncate(self._descriptor, cut)
        self._waiting = waiting

    def _stays(self, number: int, line: bytes, dropped: Callable[[Mapping[str, Any]], bool], since: int) -> bool:
        ours = _OURS.match(line)
        if ours and int(ours[1]) < since and line.endswith(b"}\n"):  # of a million lines, all but the last few
            return True
        try:
            record = _parse(line)
        except Unreadable as error:
            if line.endswith(b"\n"):
                raise _damaged(self.path, number, error) from None
            return False
        return record["step"] < since or not dropped(record)

    def close(self) -> None:
        """Close the file, its content on the disk."""
        self._write_waiting()
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _open(self) -> None:
        self._descriptor = no_link(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def _rewrite(self, place: int, lines: Sequence[bytes]) -> None:
        """What is before `place`, then these lines."""
        with drafted(self.path) as draft, draft.open("wb") as new, open_plain(self.path) as old:
            while place and (piece := old.read(min(place, 2**20))):
                new.write(piece)
                place -= len(piece)
            new.writelines(lines)
            new.flush()
            os.fsync(new.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself is on the disk only when the folder is
        finally:
            os.close(folder)
        former = self._descriptor
        self._open()
        os.close(former)
