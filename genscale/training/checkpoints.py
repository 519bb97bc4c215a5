"""Checkpoints: a directory that exists whole or not at all, in one logical format that every strategy reads and writes.

    step-00000100/
      manifest.json               step, format, what it was made by and when, every file with its size and SHA-256
      state.json                  counters, data position, loss scalers, best checkpoint, collapse watch, guards: plain JSON
      config.yaml                 the resolved config
      networks/<name>.safetensors     weights and buffers by parameter name, fp32
      optimizers/<name>.safetensors   optimizer tensors as <state key>/<parameter name>
      averages/<name>.safetensors     averaged weights and buffers, fp32, of the networks that have an average

Where several processes wrote it, each wrote a file of its own for each of the last three (`genscale.training.tensor_files`).
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genscale.errors import UserError
from genscale.training.checkpoint_names import NAME
from genscale.training.tensor_files import TensorFiles, names_in

FORMAT = 2
READABLE = (1, FORMAT)


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

    def tensors(self, kind: str, name: str) -> TensorFiles:
        """The tensors of one network (`kind` networks), its optimizer (`kind` optimizers) or its average (`kind` averages)."""
        return TensorFiles(self._files(kind).get(name) or [self.path / kind / f"{name}.safetensors"])

    def weights(self, name: str, averaged: bool) -> TensorFiles:
        """The weights and buffers of one network: the average where it is asked for and there is one, or those of the step."""
        return self.tensors("averages" if averaged and self.has_average(name) else "networks", name)

    def has_average(self, name: str) -> bool:
        """Whether it holds an average of the network."""
        return name in self._files("averages")

    def networks(self) -> list[str]:
        """Names of the networks it holds."""
        return sorted(self._files("networks"))

    def _files(self, kind: str) -> dict[str, list[Path]]:
        return names_in(self.path / kind)

    def problem(self) -> str | None:
        """Why this checkpoint cannot be trusted, or None: every file must have the size and SHA-256 of the manifest."""
        return self._first_problem(contents=True)

    def has_its_files(self) -> bool:
        """Whether every file is there in its size; what is in them is not looked at."""
        return self._first_problem(contents=False) is None

    def _first_problem(self, contents: bool) -> str | None:
        try:
            manifest = self.manifest()
            if manifest.get("format") not in READABLE:
                return f"format {manifest.get('format')} is not {' or '.join(map(str, READABLE))}"
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
                if contents and sha256_of(file) != digest:
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
            for name, files in sorted(self._files(kind).items()):
                tensors = TensorFiles(files)
                for key in tensors.keys():  # noqa: SIM118 - no mapping
                    value = tensors(key)
                    total.update(f"{kind}/{name}/{key} {value.dtype} {tuple(value.shape)}".encode())
                    total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        state = self.state()
        deciding = {key: state[key] for key in ("step", "data", "scalers")}
        if state.get("collapse"):  # of the runs that watch for it
            deciding["collapse"] = state["collapse"]
        total.update(json.dumps(deciding, sort_keys=True).encode())
        return total.hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def find_checkpoints(path: Path) -> Iterator[Checkpoint]:
    """The checkpoints a user means by a path: one checkpoint, a run folder, or its checkpoints folder. Raises UserError."""
    if (path / "manifest.json").is_file() or NAME.match(path.name):
        found = [Checkpoint(path)] if path.is_dir() else []
    else:
        found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: no checkpoint here (a checkpoint folder, or a run folder holding checkpoints/step-XXXXXXXX)")
    yield from found
