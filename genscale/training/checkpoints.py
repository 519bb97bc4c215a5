"""Checkpoints: a directory that exists whole or not at all, in one logical format that every strategy reads and writes.

    step-00000100/
      manifest.json               step, format, every file with its size and SHA-256
      state.json                  counters, data position, loss scaler, best loss, collapse watch: plain JSON
      config.yaml                 the resolved config
      networks/<name>.safetensors     weights and buffers by parameter name, fp32
      optimizers/<name>.safetensors   optimizer tensors as <state key>/<parameter name>
      averages/<name>.safetensors     averaged weights and buffers, fp32, of the networks that have an average

Nothing is ever unpickled. A checkpoint is written under a temporary name, every file is fsynced, then the directory renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from genscale.errors import UserError

FORMAT = 1
NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(NAME.match(self.path.name).group(1)) if NAME.match(self.path.name) else self.manifest()["step"]

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())

    def tensors(self, kind: str, name: str) -> TensorFile:
        """The tensors of one network (`kind` networks), its optimizer (`kind` optimizers) or its average (`kind` averages)."""
        return TensorFile(self._file(kind, name))

    def weights(self, name: str, averaged: bool) -> TensorFile:
        """The weights and buffers of one network: the average where it is asked for and there is one, or those of the step."""
        return self.tensors("averages" if averaged and self.has_average(name) else "networks", name)

    def has_average(self, name: str) -> bool:
        """Whether it holds an average of the network."""
        return self._file("averages", name).is_file()

    def _file(self, kind: str, name: str) -> Path:
        return self.path / kind / f"{name}.safetensors"

    def problem(self) -> str | None:
        """Why this checkpoint cannot be trusted, or None: every file must have the size and SHA-256 of the manifest."""
        try:
            manifest = self.manifest()
            if manifest.get("format") != FORMAT:
                return f"format {manifest.get('format')} is not {FORMAT}"
            files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        except FileNotFoundError:
            return "manifest.json is missing"
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return "manifest.json is damaged"
        for name, (size, digest) in files.items():
            file = self.path / name
            try:
                if not file.is_file():
                    return f"{name} is missing"
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes, not {size}"
                if sha256_of(file) != digest:
                    return f"{name} is damaged (SHA-256 differs)"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return None

    def digest(self) -> str:
        """One SHA-256 over all logical tensors and states: equal digests mean equal runs, whatever wrote the files.

        Covers names, shapes, dtypes and bytes of every tensor and the part of state.json that decides how the run goes on.
        """
        total = hashlib.sha256()
        for kind in ("networks", "optimizers", "averages"):
            for file in sorted((self.path / kind).glob("*.safetensors")):
                tensors = TensorFile(file)
                for key in sorted(tensors.keys()):
                    value = tensors(key)
                    total.update(f"{kind}/{file.stem}/{key} {value.dtype} {tuple(value.shape)}".encode())
                    total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        state = self.state()
        deciding = {key: state[key] for key in ("step", "data", "scalers")}
        if state.get("collapse"):  # of the runs that watch for it
            deciding["collapse"] = state["collapse"]
        total.update(json.dumps(deciding, sort_keys=True).encode())
        return total.hexdigest()


class TensorFile:
    """Tensors of a safetensors file, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint file {path} cannot be read: {error}") from None

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(self._file.get_slice(key).get_shape()) for key in self.keys()}

    def __call__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any],
                     config: str) -> Checkpoint:
    """Write `folder`/step-XXXXXXXX. `tensors` maps "networks/<name>", "optimizers/<name>" and "averages/<name>" to
    tensors by name.

    Raises OSError (a full disk, a read-only folder); the folder then holds no trace of the attempt, and earlier checkpoints
    are whole.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    try:
        for name, values in tensors.items():
            file = partial / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            _save_tensors(values, file)
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        (partial / "config.yaml").write_text(config)
        files = {str(f.relative_to(partial)): {"bytes": f.stat().st_size, "sha256": sha256_of(f)}
                 for f in sorted(partial.rglob("*")) if f.is_file()}
        (partial / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        replaced = folder / f".partial-replaced-{final.name}-{os.getpid()}"
        if final.exists():  # the same step again; renamed first, so that no kill leaves it with half its files
            final.rename(replaced)
        partial.rename(final)
        _fsync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Checkpoint(final)


def _save_tensors(values: dict[str, Tensor], file: Path) -> None:
    try:
        save_file({key: value.contiguous() for key, value in values.items()}, str(file))
    except SafetensorError as error:  # wraps "No space left on device"
        raise OSError(f"{file.name}: {error}") from None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a folder by step, earliest first, valid or not."""
    if not folder.is_dir():
        return []
    return [Checkpoint(path) for path in sorted(folder.iterdir()) if path.is_dir() and NAME.match(path.name)]


def latest_valid(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The latest checkpoint whose every byte is as written; damaged ones are named through `warn` and skipped."""
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = checkpoint.problem()
        if problem is None:
            return checkpoint
        warn(f"checkpoint {checkpoint.path} is damaged ({problem}); using the one before it")
    return None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best, and what killed writers left behind. The newest is
    never deleted."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if checkpoint.step != best_step:
            # Renamed first: a kill in the middle of deleting must not leave a checkpoint with half its files.
            doomed = folder / f".partial-deleted-{checkpoint.path.name}"
            checkpoint.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def find_checkpoints(path: Path) -> Iterator[Checkpoint]:
    """The checkpoints a user means by a path: one checkpoint, a run folder, or its checkpoints folder. Raises UserError."""
    if (path / "manifest.json").is_file() or NAME.match(path.name):
        found = [Checkpoint(path)] if path.is_dir() else []
    else:
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: no checkpoint here (a checkpoint folder, or a run folder holding checkpoints/step-XXXXXXXX)")
    yield from found
