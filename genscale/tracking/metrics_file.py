"""metrics.jsonl: the record of a run that is always written, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.reading import MAX_JSON_BYTES, Unreadable, open_plain, parse_json, read_lines
from genscale.writing import drafted, no_link


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


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, record) of every whole line. A last line that was cut short by a kill or a full disk is left out."""
    records = []
    try:
        for number, line in enumerate(read_lines(path, MAX_JSON_BYTES), 1):
            if not line.strip():
                continue
            try:
                record, why = parse_json(line), "not a JSON object with a step"
            except Unreadable as error:
                record, why = None, str(error)
            if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**63:
                records.append((line.removesuffix("\n"), record))
            elif line.endswith("\n"):
                raise UserError(f"{path}: line {number} is damaged ({why}); delete that line to go on")
    except Unreadable as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    return records


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order; empty for a missing file.

    Raises:
        UserError: a line other than a torn last one is not a JSON object with a step.
    """
    path = Path(path)
    return [record for _, record in _read(path)] if path.exists() else []


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
            file.seek(-min(1, os.fstat(file.fileno()).st_size), os.SEEK_END)
            is_whole = file.read() == b"\n"
        if not is_whole:
            self.drop(lambda record: False)

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
        self.drop(lambda record: record["step"] > step)

    def drop(self, dropped: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the records of which it is true. Atomic: all or nothing."""
        os.close(self._descriptor)
        waiting = [(line, json.loads(line)) for line in self._waiting.decode().splitlines()]
        try:
            self._rewrite([line for line, record in [*_read(self.path), *waiting] if not dropped(record)])
            self._waiting = b""
        finally:
            self._open()

    def close(self) -> None:
        """Close the file, its content on the disk."""
        self._write_waiting()
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _open(self) -> None:
        self._descriptor = no_link(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def _rewrite(self, lines: list[str]) -> None:
        with drafted(self.path) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself is on the disk only when the folder is
        finally:
            os.close(folder)
