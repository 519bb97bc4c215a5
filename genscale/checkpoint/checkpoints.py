"""Checkpoints: a directory that exists whole or not at all, in one logical format that every strategy reads and writes.

    step-00000100/
      manifest.json               step, format, what it was made by and when, every file with its size and SHA-256
      state.json                  counters, data position, loss scalers, best checkpoint, collapse watch, guards: plain JSON
      config.yaml                 the resolved config
      networks/<name>.safetensors     weights and buffers by parameter name, fp32
      optimizers/<name>.safetensors   optimizer tensors as <state key>/<parameter name>
      averages/<name>.safetensors     averaged weights and buffers, fp32, of the networks that have an average

Where several processes wrote it, each wrote a file of its own for each of the last three (`genscale.checkpoint.tensor_files`).
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from genscale.checkpoint.names import NAME
from genscale.checkpoint.tensor_files import TensorFiles, names_in
from genscale.errors import UserError
from genscale.reading import Unreadable, read_json, read_yaml

FORMAT = 2
READABLE = (1, FORMAT)
TENSORS = ("networks", "optimizers", "averages")
STATE = {"step": int, "data": dict, "scalers": dict, "plan": dict}
"""What every state.json has."""
NOT_IN_ALL = {"units": int, "accumulation": int, "evaluation": dict, "best": dict, "guards": dict, "collapse": dict,
              "frozen": dict, "judges": dict, "hooks": dict}
"""What it may have; null stands for none."""


class Damaged(UserError, ValueError):
    """A document of a checkpoint is not what genscale writes, though its bytes may be those that the manifest vouches for."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        named = NAME.match(self.path.name)
        return int(named.group(1)) if named else int(self.manifest()["step"])

    def manifest(self) -> dict[str, Any]:
        """Raises OSError and ValueError."""
        manifest = read_json(self.path / "manifest.json")
        if not isinstance(manifest, dict):
            raise Unreadable("holds no object")
        return manifest

    def state(self) -> dict[str, Any]:
        """Raises OSError and Damaged."""
        state = self._document("state.json", read_json)
        wrong = [key for key, kind in STATE.items() if not isinstance(state.get(key), kind)]
        wrong += [key for key, kind in NOT_IN_ALL.items() if state.get(key) is not None and not isinstance(state[key], kind)]
        wrong = wrong or [key for key, is_right in RIGHT.items() if state.get(key) and not is_right(state[key])]
        if wrong:
            raise Damaged(f"checkpoint file {self.path / 'state.json'}: {wrong[0]} is not what genscale writes there")
        return state

    def config(self) -> dict[str, dict[str, Any]]:
        """The sections of config.yaml. Raises OSError and Damaged."""
        config = self._document("config.yaml", read_yaml)
        if not all(isinstance(section, dict) for section in config.values()):
            raise Damaged(f"checkpoint file {self.path / 'config.yaml'} does not hold sections of settings")
        return config

    def _document(self, name: str, read: Callable[[Path], Any]) -> dict[str, Any]:
        try:
            content = read(self.path / name)
        except Unreadable as error:
            raise Damaged(f"checkpoint file {self.path / name} {error}") from None
        if not isinstance(content, dict):
            raise Damaged(f"checkpoint file {self.path / name} holds no mapping")
        return content

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
        if unlisted := self._unlisted(set(files)):
            return f"manifest.json does not list {unlisted}"
        for name, (size, digest) in files.items():
            file = self.path / name
            try:
                if problem := self._not_its_own(name):
                    return f"{name} {problem}"
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes, not {size}"
                if contents and sha256_of(file) != digest:
                    return f"{name} is damaged (SHA-256 differs)"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        return None

    def _unlisted(self, listed: set[str]) -> str | None:
        """A file that would be read, and that the manifest does not vouch for."""
        found = [file.relative_to(self.path).as_posix()
                 for kind in TENSORS for files in self._files(kind).values() for file in files]
        if not any(name.startswith("networks/") for name in listed):
            return "any file of networks/"
        return next((name for name in ["state.json", "config.yaml", *found] if name not in listed), None)

    def _not_its_own(self, name: str) -> str | None:
        """Why a name of the manifest is not that of a plain file in the checkpoint."""
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            return "is no name of a file in the checkpoint"
        for depth in range(1, len(parts) + 1):
            try:
                mode = os.lstat(self.path.joinpath(*parts[:depth])).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return "is missing"
            if stat.S_ISLNK(mode):
                return "is a link, or lies behind one; a checkpoint holds its files itself"
        return None if stat.S_ISREG(mode) else "is missing: no plain file is there"

    def digest(self) -> str:
        """One SHA-256 over all logical tensors and states: equal digests mean equal runs, whatever wrote the files.

        Covers names, shapes, dtypes and bytes of every tensor and the part of state.json that decides how the run goes on.
        """
        total = hashlib.sha256()
        for kind in TENSORS:
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
        if state.get("frozen"):
            deciding["frozen"] = {name: entry["sha256"] for name, entry in state["frozen"].items()}
        total.update(json.dumps(deciding, sort_keys=True).encode())
        return total.hexdigest()


def _is_position(data: dict[str, Any]) -> bool:
    """Whether it says where a run is in its data."""
    cursors = data.get("cursors")
    return _is_count(data.get("batches")) and isinstance(cursors, dict) and all(
        lane.isdecimal() and isinstance(entry, dict) and _is_count(entry.get("position")) for lane, entry in cursors.items())


def _is_guard(guards: dict[str, Any]) -> bool:
    """Whether it says which updates were left out, and what the losses were."""
    lists = [guards.get("batches", []), *_values(guards.get("rows", {})), *_values(guards.get("losses", {}))]
    return all(isinstance(row, list) and all(isinstance(each, (int, float)) for each in row) for row in lists)


def _is_best(best: dict[str, Any]) -> bool:
    return _is_count(best.get("step")) and ("loss" in best or "metric" in best)


def _is_frozen(frozen: dict[str, Any]) -> bool:
    return all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("sha256", "origin"))
               for entry in frozen.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _values(value: Any) -> list[Any]:
    """The values of a mapping; what is none is returned as the one of them."""
    return list(value.values()) if isinstance(value, dict) else [value]


RIGHT: dict[str, Callable[[Any], bool]] = {"step": _is_count, "data": _is_position, "guards": _is_guard, "best": _is_best,
                                           "frozen": _is_frozen, "judges": _is_frozen}
"""Parts of state.json that are looked into."""


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
