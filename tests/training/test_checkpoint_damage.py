"""Checkpoints that are not as they were written: every damage named, nothing unpickled, and which ones are kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.checkpoint.checkpoints import Checkpoint, latest_valid, list_checkpoints
from genscale.checkpoint.retention import prune
from genscale.checkpoint.writing import write_checkpoint
from genscale.errors import UserError

STATE = {"step": 20, "data": {"batches": 20, "cursors": {}}, "scalers": {}, "best": None, "plan": {}}
WEIGHTS = "networks/gpt.safetensors"
OPTIMIZER = "optimizers/gpt.safetensors"


def write(folder: Path, step: int = 20) -> Checkpoint:
    tensors = {"networks/gpt": {"a.weight": torch.randn(3, 4)}, "networks/critic": {"w": torch.ones(5)},
               "optimizers/gpt": {"exp_avg/a.weight": torch.randn(3, 4)}}
    return write_checkpoint(folder, step, tensors, STATE, "run: {}\n")


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def without(key: str) -> Callable[[Path], object]:
    def remove(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))
    return remove


DAMAGES = {
    "flipped bit": (WEIGHTS, flip_last_bit, "networks/gpt.safetensors is damaged (SHA-256 differs)"),
    "flipped bit of the state": ("state.json", flip_last_bit, "state.json is damaged (SHA-256 differs)"),
    "cut short": (WEIGHTS, cut_short, "networks/gpt.safetensors has "),
    "emptied": (OPTIMIZER, lambda path: path.write_bytes(b""), "optimizers/gpt.safetensors has 0 bytes, not "),
    "missing": (OPTIMIZER, Path.unlink, "optimizers/gpt.safetensors is missing"),
    "missing config": ("config.yaml", Path.unlink, "config.yaml is missing"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "cut manifest": ("manifest.json", cut_short, "manifest.json is damaged"),
    "binary manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "manifest.json is damaged"),
    "manifest of another kind": ("manifest.json", lambda path: path.write_text("[1]"), "manifest.json is damaged"),
    "manifest without files": ("manifest.json", without("files"), "manifest.json is damaged"),
    "later format": ("manifest.json", lambda path: path.write_text('{"format": 99}'), "format 99 is not 1 or 2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    earlier, found = write(tmp_path, 10), write(tmp_path, 20)
    file, spoil, words = DAMAGES[damage]
    spoil(found.path / file)
    assert found.problem().startswith(words)
    warnings: list[str] = []
    assert latest_valid(tmp_path, warnings.append) == earlier
    (warning,) = warnings
    assert str(found.path) in warning and found.problem() in warning
    (earlier.path / "state.json").unlink()
    assert latest_valid(tmp_path, warnings.append) is None
    assert len(warnings) == 3


def test_the_files_of_a_checkpoint_are_its_own(tmp_path: Path) -> None:
    for name, words in (("../outside", "is no name of a file"), ("/etc/hostname", "is no name of a file"),
                        ("", "is no name of a file"), ("networks/../../outside", "is no name of a file"),
                        ("linked", "is a link"), ("behind/outside", "is a link"), ("pipe", "no plain file"),
                        ("networks", "no plain file")):
        found = write(tmp_path / "run")
        (tmp_path / "outside").write_text("x")
        (found.path / "linked").symlink_to(tmp_path / "outside")
        (found.path / "behind").symlink_to(tmp_path)
        os.mkfifo(found.path / "pipe")
        manifest = json.loads((found.path / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
        (found.path / "manifest.json").write_text(json.dumps(manifest))
        assert words in found.problem() and not found.has_its_files(), name


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    found = write(tmp_path)
    file = found.path / WEIGHTS
    file.write_bytes(b"")
    # The memory of a process stands for a bad sector: it is a file, and reading its first byte fails.
    done = subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", file], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here ({done.stderr.strip()})")
    try:
        manifest = found.manifest()
        manifest["files"][WEIGHTS]["bytes"] = 0
        (found.path / "manifest.json").write_text(json.dumps(manifest))
        assert found.problem().startswith(f"{WEIGHTS} cannot be read")
    finally:
        subprocess.run(["umount", file], check=False, timeout=20)


def test_a_manifest_lists_what_is_read(tmp_path: Path) -> None:
    for left_out, words in ((list, "any file of networks/"), ([WEIGHTS], WEIGHTS), ([OPTIMIZER], OPTIMIZER),
                            (["state.json"], "state.json"), (["config.yaml"], "config.yaml")):
        found = write(tmp_path)
        manifest = found.manifest()
        manifest["files"] = {} if left_out is list else {
            name: entry for name, entry in manifest["files"].items() if name not in left_out}
        (found.path / "manifest.json").write_text(json.dumps(manifest))
        assert found.problem() == f"manifest.json does not list {words}"


@pytest.mark.parametrize(("file", "text", "words"), [
    ("state.json", "[" * 100_000, "levels deep"), ("state.json", "[]", "no mapping"),
    ("state.json", json.dumps({**STATE, "data": {"batches": 1, "cursors": {"x": 5}}}), "data is not"),
    ("state.json", json.dumps({**STATE, "plan": 5}), "plan is not"), ("state.json", '{"step": 1, "step": 2}', "two values"),
    ("config.yaml", "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
                                               for i in range(9)), "aliases"),
    ("config.yaml", "{a: " * 100_000, "levels deep"), ("config.yaml", "train: 5", "sections"),
    ("config.yaml", "", "no mapping")], ids=range(9))
def test_a_document_that_says_something_else_is_one_line(file: str, text: str, words: str, tmp_path: Path) -> None:
    found = write(tmp_path)
    (found.path / file).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        found.state() if file == "state.json" else found.config()
    assert str(found.path / file) in str(error.value)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "config.yaml"])
def test_a_pipe_is_not_waited_for(file: str, tmp_path: Path) -> None:
    found = write(tmp_path)
    (found.path / file).unlink()
    os.mkfifo(found.path / file)
    assert "damaged" in found.problem() or "no plain file" in found.problem()
    for read in (found.manifest, found.state, found.config):
        if file.partition(".")[0] == read.__name__:
            with pytest.raises(ValueError, match="named pipe"):
                read()


# --- nothing is unpickled --------------------------------------------------------------------------------------------

class Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("file", [WEIGHTS, "state.json", "manifest.json"])
def test_a_pickle_is_refused_and_never_run(save: Callable[[Any, Path], Any], file: str, tmp_path: Path) -> None:
    found, mark = write(tmp_path / "run"), tmp_path / "unpickled"
    planted = found.path / file
    save({"a.weight": Trap(mark)}, planted)
    if file != "manifest.json":  # a planted file comes with a manifest that vouches for it
        manifest = found.manifest()
        manifest["files"][file] = {"bytes": planted.stat().st_size, "sha256": hashlib.sha256(planted.read_bytes()).hexdigest()}
        (found.path / "manifest.json").write_text(json.dumps(manifest))
    if file == WEIGHTS:
        with pytest.raises(UserError, match="cannot be read"):
            found.tensors("networks", "gpt")
        with pytest.raises(UserError, match="cannot be read"):
            found.digest()
    elif file == "state.json":
        with pytest.raises(ValueError):
            found.state()
    else:
        assert found.problem() == "manifest.json is damaged"
    assert not mark.exists()
    content = planted.read_bytes()
    torch.load(io.BytesIO(content), weights_only=False) if save is torch.save else pickle.loads(content)
    assert mark.exists(), "the trap would not have sprung"


# --- which are kept --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep, best, kept", [
    (1, None, [50]), (2, None, [40, 50]), (9, None, [10, 20, 30, 40, 50]),
    (1, 20, [20, 50]), (2, 50, [40, 50]), (2, 40, [40, 50]), (3, 10, [10, 30, 40, 50]), (1, 99, [50])])
def test_prune_keeps_the_last_and_the_best(keep: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    (tmp_path / ".partial-step-00000060-123").mkdir()
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", *(f"step-{step:08d}" for step in kept)]
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == kept
    assert all(checkpoint.problem() is None for checkpoint in list_checkpoints(tmp_path))


def test_prune_keeps_every_so_many_for_ever(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write(tmp_path, step)
    prune(tmp_path, 1, best_step=20, keep_every=30)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [20, 30, 60, 70]


@pytest.mark.parametrize("damage", ["cut short", "missing", "no manifest", "cut manifest"])
def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(damage: str, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    file, spoil, _ = DAMAGES[damage]
    spoil(tmp_path / "step-00000040" / file)
    prune(tmp_path, 1, None)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [30, 40]
    assert latest_valid(tmp_path, lambda _: None).step == 30
