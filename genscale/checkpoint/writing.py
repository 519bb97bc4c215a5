"""How a checkpoint comes to be: written under a temporary name, every file through to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genscale.checkpoint.checkpoints import FORMAT, Checkpoint
from genscale.checkpoint.tensor_files import TensorBuffer, part_name
from genscale.parallel.pieces import pieces_of

REPLACED = re.compile(r"^\.partial-replaced-(step-\d{8})-")
Files = dict[str, dict[str, Any]]
"""By path within the checkpoint: its bytes and sha256."""


def new_partial(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step in, which no other attempt has, on this machine or another.

    Raises OSError, also where `folder` is gone: a run folder that was moved away must not come to be again."""
    partial = folder / f".partial-step-{step:08d}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", platform.node())[:40]


def commit(partial: Path, step: int, files: Files, state: Mapping[str, Any], config: str, about: Mapping[str, Any],
           may_commit: Callable[[], object] | None = None) -> Checkpoint:
    """Add what one process knows to the tensor files, which are on the disk, and make the folder the checkpoint of the step.

    Raises OSError, or what `may_commit` raises; there is then no new checkpoint, and an earlier one of the step is whole.
    """
    documents = {"state.json": json.dumps(state, indent=1).encode(), "config.yaml": config.encode()}
    entries = {name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in documents.items()}
    manifest = {"format": FORMAT, "step": step, "about": dict(about), "files": dict(sorted({**files, **entries}.items()))}
    for name, text in {**documents, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
        (partial / name).write_bytes(text)
        fsync(partial / name)
    for path in [*(path for path in partial.iterdir() if path.is_dir()), partial]:
        fsync(path)
    if may_commit is not None:
        may_commit()
    folder, final = partial.parent, partial.parent / f"step-{step:08d}"
    replaced = folder / f".partial-replaced-{final.name}-{secrets.token_hex(4)}"
    if final.exists():  # the same step again; renamed first, so that no kill leaves it with half its files
        final.rename(replaced)
    partial.rename(final)
    fsync(folder)
    _remove(replaced)
    return Checkpoint(final)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed writers left behind. A checkpoint that was to be replaced by another of its step, and was not, is put
    back."""
    for path in folder.glob(".partial-*"):
        replaced = REPLACED.match(path.name)
        if replaced and not (folder / replaced.group(1)).exists():
            path.rename(folder / replaced.group(1))
        else:
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, or what was to become one. Renamed first: a kill in the middle must not leave a checkpoint with half
    its files, nor may a writer that is still alive make one of what is being deleted."""
    doomed = path.with_name(f".partial-deleted-{secrets.token_hex(8)}")
    try:
        path.rename(doomed)
    except FileNotFoundError:  # it has become a checkpoint meanwhile
        return
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete whatever it is, as far as that goes: rmtree would wait for somebody to write into a named pipe."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any],
                     config: str, about: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write `folder`/step-XXXXXXXX at once, by this process alone. `tensors` maps "networks/<name>", "optimizers/<name>" and
    "averages/<name>" to whole tensors by name.

    Raises OSError (a full disk, a read-only folder); the folder then holds no trace of the attempt, and earlier checkpoints
    are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = new_partial(folder, step)
    try:
        files: Files = {}
        for name, values in tensors.items():
            buffer, file = TensorBuffer(), part_name(name, 0, 1)
            buffer.take(pieces_of(values.items(), 0, 1))
            (partial / file).parent.mkdir(exist_ok=True)
            files[file] = buffer.write(partial / file)
        return commit(partial, step, files, state, config, about or {})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
