"""Checkpoints are written in the background: a step waits for a copy to host memory, not for a disk.

Every process writes its own pieces, and says through a file in the partial folder that it has, or why it could not: threads
take part in no collective. Rank 0 then makes the folder a checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.checkpoint.retention import prune
from genscale.checkpoint.tensor_files import TensorBuffer, part_name
from genscale.checkpoint.writing import Files, commit, new_partial
from genscale.errors import CheckpointNotWritten, UserError
from genscale.parallel.pieces import Piece
from genscale.parallel.processes import Processes

log = logging.getLogger("genscale")
LOOK_EVERY = 0.05
"""Seconds between two looks whether the other processes have written their parts."""
PATIENCE = 10.0
"""Seconds that a failing run waits for the parts of processes that may be gone."""


@dataclass(frozen=True)
class Contents:
    """What is saved of a step beside the tensors; only rank 0's is written.

    Attributes:
        best_step: of the best checkpoint, which is kept.
        last: no save follows: if this one fails, so does the run.
    """

    step: int
    state: dict[str, Any]
    config: str
    about: dict[str, Any]
    best_step: int | None
    last: bool


@dataclass
class _Save:
    """One on its way."""

    contents: Contents
    partial: Path | None = None
    thread: threading.Thread | None = None
    error: Exception | None = None
    written: threading.Event = field(default_factory=threading.Event)  # this process's part, or it has failed
    part_missing: threading.Event = field(default_factory=threading.Event)
    missing: str = ""

    @property
    def draft(self) -> Path:
        """The folder that its thread writes into."""
        assert self.partial is not None  # there before the thread starts
        return self.partial


class Saver:
    """Saves the checkpoints of a run, one after the other. Its methods are collective, except `finish`.

    Args:
        folder: of the checkpoints; made here where it is not there, and not later, for a run folder that was moved away must
            not come to be again.
        keep, keep_every: which to keep, as `retention.prune` has it.
        may_commit: raises where the run folder is another's by now; called on rank 0 before a checkpoint comes to be.
    """

    def __init__(self, folder: Path, processes: Processes, keep: int, keep_every: int = 0,
                 may_commit: Callable[[], object] | None = None) -> None:
        self.folder, self.processes, self.keep, self.keep_every = folder, processes, keep, keep_every
        self.may_commit = may_commit
        if processes.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self._buffers: dict[str, TensorBuffer] = {}
        self._save: _Save | None = None

    def start(self, pieces: Mapping[str, Sequence[Piece]], contents: Contents) -> None:
        """Copy this process's pieces, by file ("networks/<name>", ...), and write them in the background. The save before must
        be settled."""
        assert self._save is None
        save = self._save = _Save(contents)
        try:
            save.partial = self.processes.main_does(lambda: new_partial(self.folder, contents.step))
        except OSError as error:
            self._fail(save, error)
            return
        for name, values in pieces.items():
            self._buffers.setdefault(name, TensorBuffer(self.processes.device.type == "cuda")).take(values)
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        save.thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
        save.thread.start()

    def settle(self) -> bool | None:
        """Wait for the save in flight: whether there is a checkpoint now; None where there was nothing to wait for.

        Raises UserError where that was the last one and there is none, or what `may_commit` raised.
        """
        save = self._save
        if save is None:
            return None
        save.written.wait()
        reasons = self.processes.gather(_reason(save.error) if save.error else "")
        if save.thread is not None:
            if any(reasons) and self.processes.is_main:  # which a full or lost disk may have kept from being told by a file
                rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
                save.missing = f"process {rank}: {reason}"
                save.part_missing.set()
            save.thread.join()
        self._save = None
        return self.processes.main_does(lambda: self._came_to_be(save))

    def _came_to_be(self, save: _Save) -> bool:
        if isinstance(save.error, UserError):
            raise save.error
        if save.error is not None and save.contents.last:
            kind = CheckpointNotWritten if isinstance(save.error, OSError) else UserError
            raise kind(f"{self._failure(save)}; last good checkpoint: {self._last_good()}")
        return save.error is None

    def finish(self) -> None:
        """Let a save in flight come to its end where the run fails, and other processes may be gone."""
        if self._save is None or self._save.thread is None:
            return
        self._save.written.wait()
        self._save.thread.join(None if self.processes.world_size == 1 else PATIENCE)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self, save: _Save) -> None:
        try:
            files = self._write_part(save)
            save.written.set()
            if self.processes.is_main:
                files |= self._parts_of_others(save)
                contents = save.contents
                commit(save.draft, contents.step, files, contents.state, contents.config, contents.about, self.may_commit)
                self._prune(contents.best_step)
        except Exception as error:
            self._fail(save, error)
        finally:
            save.written.set()  # whatever has happened, the run waits for it

    def _prune(self, best_step: int | None) -> None:
        try:
            if self.may_commit is not None:  # a commit can take long, and what is deleted may be what the new owner reads
                self.may_commit()
            prune(self.folder, self.keep, best_step, self.keep_every)
        except OSError as error:  # the new one is there all the same
            log.warning("earlier checkpoints could not be deleted: %s", _reason(error))

    def _write_part(self, save: _Save) -> Files:
        files: Files = {}
        for name, buffer in self._buffers.items():
            file = part_name(name, self.processes.rank, self.processes.world_size)
            (save.draft / file).parent.mkdir(exist_ok=True)
            files[file] = buffer.write(save.draft / file, self.processes.note_write)
        if not self.processes.is_main:
            report = self._report(save, self.processes.rank)
            whole = report.with_suffix(".tmp")
            whole.write_text(json.dumps(files))
            whole.rename(report)
        return files

    def _parts_of_others(self, save: _Save) -> Files:
        """What the other processes have written. Raises OSError where one could not."""
        files: Files = {}
        for rank in range(1, self.processes.world_size):
            report = self._report(save, rank)
            while not report.exists():
                if report.with_suffix(".failed").exists():
                    raise OSError(f"process {rank}: {report.with_suffix('.failed').read_text()}")
                if save.part_missing.wait(LOOK_EVERY):
                    raise OSError(save.missing)
            files |= json.loads(report.read_text())
        for rank in range(1, self.processes.world_size):
            self._report(save, rank).unlink()
        return files

    def _report(self, save: _Save, rank: int) -> Path:
        return save.draft / f"part-{rank:05d}.json"

    def _fail(self, save: _Save, error: Exception) -> None:
        """Leave nothing behind, and say why: once, by rank 0."""
        save.error = error
        if not self.processes.is_main:
            self._tell(save, error)
        else:
            if save.partial is not None:
                shutil.rmtree(save.partial, ignore_errors=True)
            if not save.contents.last and not isinstance(error, UserError):  # which `settle` raises
                log.warning("%s; training goes on, last good checkpoint: %s", self._failure(save), self._last_good(),
                            exc_info=None if isinstance(error, OSError) else error)
        save.written.set()

    def _tell(self, save: _Save, error: Exception) -> None:
        if save.partial is None:
            return
        try:
            for name in self._buffers:  # a full disk has room for the reason then
                (save.partial / part_name(name, self.processes.rank, self.processes.world_size)).unlink(missing_ok=True)
            failed = self._report(save, self.processes.rank).with_suffix(".failed")
            failed.with_suffix(".tmp").write_text(_reason(error))
            failed.with_suffix(".tmp").rename(failed)
        except OSError:
            pass  # `settle` will tell

    def _failure(self, save: _Save) -> str:
        return f"checkpoint {self.folder / f'step-{save.contents.step:08d}'} could not be written: {_reason(save.error)}"

    def _last_good(self) -> str:
        try:
            found = list_checkpoints(self.folder)
        except OSError as error:  # the disk that did not take this one may show none either
            return f"unknown ({_reason(error)})"
        return str(found[-1].path) if found else "none"


def _reason(error: Exception | None) -> str:
    return str(getattr(error, "strerror", None) or error)
