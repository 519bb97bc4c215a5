"""The lives of a run as one W&B run.

Each start of a run leaves a log of its own under `wandb/`, all with one run id. A life that was killed has logged steps that
the next one, which goes on from a checkpoint, logs again; its last rows are missing in its log, for W&B writes 32 KiB at a time
(hours of a slow run, all of a short one); and after a rollback W&B takes no step that it has had. metrics.jsonl has every step
once, as it was in the end. So the rows of all lives are put together by step, the later life's in the place of the earlier
one's, with the numbers of metrics.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from genscale.errors import UserError
from genscale.reading import Unreadable, read_yaml
from genscale.tracking.metrics_file import read_metrics
from genscale.tracking.wandb_id import RUN_ID, read_run_id
from genscale.tracking.wandb_log import OtherFormat, read_records, write_records

Row = dict[tuple[str, ...], str]
"""JSON by key; a key has more than one part where W&B nests it."""
SAMPLE = re.compile(r"(?P<key>.+)_(?P<step>\d+)_[0-9a-f]{20}\.(html|png)")
"""How W&B calls the file of a sample."""
STEP, RUNTIME, TIMESTAMP = ("_step",), ("_runtime",), ("_timestamp",)
EVERY = ("config", "environment", "metric", "output", "output_raw", "stats", "telemetry")
"""Records that are simply taken over from every life. Others are put together here, or ask W&B for what no run of ours does:
to upload files from anywhere on this machine, or to send messages."""


@dataclass(frozen=True)
class Uploaded:
    """What a server has of a run.

    Attributes:
        step: the last one that has a row.
        seconds: time (Unix) of the last measurement of the machine.
    """

    step: int = -1
    seconds: float = 0.0


@dataclass
class _Life:
    """The log of one life."""

    path: Path
    records: list[Any] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Any]:
        return [record for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def started(self) -> float:
        described = self.of_kind("run")
        return _seconds(described[0].run.start_time) if described else self.path.stat().st_mtime


@dataclass
class Joined:
    """What the lives come to.

    Attributes:
        lives: in the order of their beginnings.
        rows: what was logged, by step.
    """

    lives: list[_Life]
    rows: dict[int, Row]

    @property
    def run(self) -> Any:
        """W&B's description of the run (`run_id`, `entity`, `project`), as its last life has it."""
        return self._described[-1].of_kind("run")[0].run

    @property
    def _described(self) -> list[_Life]:
        return [life for life in self.lives if life.of_kind("run")]

    def write(self, out: Path, have: Uploaded) -> Path:
        """A folder as W&B makes one for a run, inside `out`, with what the server has not yet. W&B is told to resume the run,
        so that it comes after what is there."""
        folder = out / f"offline-run-{self.lives[0].path.parent.name.partition('run-')[2]}"
        rows = {step: row for step, row in sorted(self.rows.items()) if step > have.step}
        text = "".join(value for row in rows.values() for value in row.values())
        (folder / "files").mkdir(parents=True)
        names = {name for life in self.lives for name in _link_files(life.path.parent / "files", folder / "files", text)}
        write_records(folder / f"run-{self.run.run_id}.wandb", _numbered(self._records(rows, have, sorted(names))))
        return folder

    def _records(self, rows: dict[int, Row], have: Uploaded, names: list[str]) -> Iterator[Any]:
        """The run, what W&B has noted of each life, the rows, the latest values of all, and how the last life ended."""
        Record = _record_class()
        first, run = self._described[0], self._described[-1].of_kind("run")[0]
        yield from first.of_kind("header")[:1]
        run.run.start_time.CopyFrom(first.of_kind("run")[0].run.start_time)
        run.run.resume = True
        yield run
        for life in self.lives:
            for record in life.records:
                kind = record.WhichOneof("record_type")
                if kind in EVERY and not (kind == "stats" and _seconds(record.stats.timestamp) <= have.seconds):
                    yield record
        for step, row in rows.items():
            record = Record()
            record.history.step.num = step
            for key, value in row.items():
                record.history.item.add(nested_key=key, value_json=value)
            yield record
        files, summary = Record(), Record()
        for name in names:
            files.files.files.add(path=name)
        yield files
        for key, value in {key: value for _, row in sorted(self.rows.items()) for key, value in row.items()}.items():
            summary.summary.update.add(nested_key=key, value_json=value)
        yield summary
        yield from self.lives[-1].of_kind("exit")


def join_lives(run_folder: Path) -> Joined:
    """All that W&B has kept in a run folder.

    Raises:
        UserError: there is nothing, or W&B's format is not known to this version.
    """
    try:
        lives = _lives(run_folder)
        rows = _rows(lives)
        _complete(rows, run_folder)
        for life in reversed(lives):
            _add_samples(rows, life.path.parent / "files")
        joined = Joined(lives, rows)
        if not RUN_ID.fullmatch(joined.run.run_id):
            raise ValueError(f"a run called {joined.run.run_id[:80]!r}")
        return joined
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{run_folder}: its W&B records are not as W&B writes them ({type(error).__name__}: "
                        f"{str(error)[:200]}); remove those that are damaged") from None


def _lives(run_folder: Path) -> list[_Life]:
    Record, lives = _record_class(), []
    for path in run_folder.glob("wandb/*run-*/run-*.wandb"):
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            continue
        try:
            lives.append(_Life(path, [_parsed(Record, content) for content in read_records(path)]))
        except OtherFormat as error:
            raise UserError(f"{run_folder}: {error}; upload it with `wandb sync --include-online {run_folder}/wandb`") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
    if not lives:
        raise UserError(f"{run_folder}: holds no W&B run to upload (wandb/*run-*/*.wandb); set tracking.wandb to offline or "
                        "online in the runs to come")
    if not any(life.of_kind("run") for life in lives):
        lives[-1].records.append(_described(run_folder))
    return sorted(lives, key=lambda life: life.started)


def _record_class() -> Any:
    """W&B's record; it is made as it is imported, for the protobuf that is installed."""
    return import_module("wandb.proto.wandb_internal_pb2").Record


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        return kind.FromString(content)
    except Exception as error:  # protobuf's, whose name depends on how it is built
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _described(run_folder: Path) -> Any:
    """The record by which W&B would have described the run."""
    try:
        config = read_yaml(run_folder / "config.yaml")
        run_id = read_run_id(run_folder / "wandb")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); W&B has kept nothing else of this run") from None
    except Unreadable as error:
        raise UserError(f"{run_folder / 'config.yaml'} {error}; W&B has kept nothing else of this run") from None
    if not isinstance(config, dict) or not isinstance(config.get("tracking"), dict):
        raise UserError(f"{run_folder / 'config.yaml'} is not that of a run; W&B has kept nothing else of this run")
    tracking, record = config["tracking"], _record_class()()
    record.run.run_id, record.run.project, record.run.display_name = run_id, tracking["project"], run_folder.resolve().name
    record.run.entity = tracking["entity"] or ""
    record.run.start_time.FromSeconds(int((run_folder / "wandb" / "run_id").stat().st_mtime))
    for key, value in config.items():
        record.run.config.update.add(key=key, value_json=json.dumps(value))
    return record


def _rows(lives: list[_Life]) -> dict[int, Row]:
    """Rows by step. A life that goes on from an earlier step takes the place of what came after it."""
    rows: dict[int, Row] = {}
    for life in lives:
        last, before = -1, max((float(row[RUNTIME]) for row in rows.values() if RUNTIME in row), default=0.0)
        for record in life.of_kind("history"):
            row = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            step = int(json.loads(row[STEP])) if STEP in row else record.history.step.num
            row[STEP] = str(step)
            if RUNTIME in row:  # each life counts from its own start
                row[RUNTIME] = json.dumps(float(row[RUNTIME]) + before)
            if last < 0 or step < last:
                rows = {kept: values for kept, values in rows.items() if kept <= step}
            rows[step] = {**rows.get(step, {}), **row}
            last = step
    return rows


def _complete(rows: dict[int, Row], run_folder: Path) -> None:
    """Take the numbers of metrics.jsonl. A row that W&B has lost gets the time of the one before it."""
    latest: Row = {}
    for line in read_metrics(run_folder / "metrics.jsonl"):
        step = line["step"]
        known = rows.get(step, {STEP: str(step)})
        latest |= {key: known[key] for key in (RUNTIME, TIMESTAMP) if key in known}
        numbers: Row = {(key,): json.dumps(value) for key, value in line.items()
                   if key not in ("step", "data_digest") and isinstance(value, (int, float))}
        rows[step] = {**latest, **known, **numbers}


def _add_samples(rows: dict[int, Row], files: Path) -> None:
    """Show the samples that W&B has kept in files, where the rows that showed them are lost."""
    for path in sorted(files.glob("media/*/*")):
        named = SAMPLE.fullmatch(path.name)
        if not named or len(named["step"]) > 18 or int(named["step"]) > max(rows, default=-1) or not _is_own(path):
            continue
        step, key = int(named["step"]), named["key"]
        row = rows.setdefault(step, {STEP: str(step)})
        if (key, "path") in row:
            continue
        content = path.read_bytes()
        about = {"_type": "html-file", "path": path.relative_to(files).as_posix(), "size": len(content),
                 "sha256": hashlib.sha256(content).hexdigest()}
        if path.suffix == ".png":
            try:
                with Image.open(path, formats=["PNG"]) as image:
                    about |= {"_type": "image-file", "format": "png", "width": image.width, "height": image.height}
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture of a run
                continue
        row |= {(key, name): json.dumps(value) for name, value in about.items()}


def _numbered(records: Iterator[Any]) -> Iterator[bytes]:
    for number, record in enumerate(records, 1):
        record.num = number
        record.ClearField("control")  # nobody waits for an answer
        yield record.SerializeToString()


def _link_files(source: Path, target: Path, text: str) -> Iterator[str]:
    """Samples and the like, under the names that the rows have for them."""
    for path in source.rglob("*") if not source.is_symlink() else ():
        name = path.relative_to(source).as_posix()
        if not _is_own(path) or not _is_wanted(name, text):
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, copy)
        yield name


def _is_own(path: Path) -> bool:
    """Whether it is a file of the run: no link, which may lead to what is not to be uploaded, and no pipe."""
    return path.is_file() and not path.is_symlink() and not path.parent.is_symlink()


def _is_wanted(name: str, text: str) -> bool:
    """Whether a file is to be uploaded: all but samples that no row among `text` shows."""
    return not name.startswith("media/") or json.dumps(name) in text


def _seconds(timestamp: Any) -> float:
    return timestamp.seconds + timestamp.nanos / 1e9
