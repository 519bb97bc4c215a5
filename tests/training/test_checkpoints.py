"""Checkpoints: whole or absent, every damage named, equal digests for equal content, nothing unpickled, the right ones kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints, latest_valid, list_checkpoints
from genscale.checkpoint.retention import prune
from genscale.checkpoint.tensor_files import TensorBuffer, TensorFiles, part_name
from genscale.checkpoint.writing import commit, new_partial, write_checkpoint
from genscale.errors import UserError
from genscale.parallel.pieces import Piece

STATE = {"step": 20, "data": {"batches": 20, "cursors": {"0": {"position": 3, "cursor": None}}},
         "scalers": {"gpt": {"scale": 8.0}}, "best": None, "plan": {}}


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {"networks/gpt": {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.tensor(2.0),
                             "seen": torch.tensor([1, 2]), "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 4)},
            "networks/critic": {"w": torch.randn(5, generator=generator).bfloat16()},
            "optimizers/gpt": {"exp_avg/a.weight": torch.randn(3, 4, generator=generator), "step/a.weight": torch.tensor(20.0)}}


def write(folder: Path, step: int = 20, **changes: Any) -> Checkpoint:
    return write_checkpoint(folder, step, changes.get("tensors", tensors()), changes.get("state", STATE), "run: {}\n")


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    found = write(tmp_path)
    assert found.path == tmp_path / "step-00000020" and found.step == 20 and found.problem() is None
    assert found.state() == STATE and (found.path / "config.yaml").read_text() == "run: {}\n"
    for name, values in tensors().items():
        read = found.tensors(*name.split("/"))
        assert sorted(read.keys()) == sorted(values)
        assert read.shapes() == {key: tuple(value.shape) for key, value in values.items()}
        for key, value in values.items():
            assert torch.equal(read(key), value) and read(key).dtype == value.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {"turned": base.T, "part": torch.arange(9.0)[2::3]}
    read = write(tmp_path, tensors={"networks/gpt": views}).tensors("networks", "gpt")
    assert torch.equal(read("turned"), base.T) and torch.equal(read("part"), torch.tensor([2.0, 5.0, 8.0]))


# --- damage ----------------------------------------------------------------------------------------------------------

WEIGHTS = "networks/gpt.safetensors"
OPTIMIZER = "optimizers/gpt.safetensors"


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


# --- digest ----------------------------------------------------------------------------------------------------------

def test_digest_is_of_the_content_and_not_of_the_files(tmp_path: Path) -> None:
    first = write(tmp_path / "first")
    backwards = {name: dict(reversed(values.items())) for name, values in reversed(tensors().items())}
    state = {**dict(reversed(STATE.items())), "best": {"step": 10, "loss": 1.0}, "plan": {"source": "elsewhere"}}
    second = write_checkpoint(tmp_path / "second", 40, backwards, state, "run: {name: other}\n")
    assert first.digest() == second.digest()
    # The same tensors behind another header: a safetensors file may carry remarks and padding.
    for name, values in tensors().items():
        save_file(values, first.path / f"{name}.safetensors", metadata={"remark": name})
    assert first.digest() == second.digest()


def changed_tensors() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """One change each, the least there is."""
    found = {}
    for name, values in tensors().items():
        for key, value in values.items():
            if value.numel():
                least = value.clone().reshape(-1)
                least.view(torch.uint8)[0] ^= 1
                found[f"a bit of {name} {key}"] = {name: {**values, key: least.reshape(value.shape)}}
    gpt = tensors()["networks/gpt"]
    found["a shape"] = {"networks/gpt": {**gpt, "a.weight": gpt["a.weight"].reshape(4, 3)}}
    found["a type"] = {"networks/gpt": {**gpt, "seen": gpt["seen"].view(torch.float64)}}
    found["a name"] = {"networks/gpt": {**{key: value for key, value in gpt.items() if key != "b"}, "c": gpt["b"]}}
    found["one tensor less"] = {"networks/gpt": {key: value for key, value in gpt.items() if key != "empty"}}
    found["another network"] = {"networks/generator": gpt}
    return found


def test_digest_changes_with_any_bit_of_any_tensor(tmp_path: Path) -> None:
    digests = {"unchanged": write(tmp_path / "unchanged").digest()}
    for what, change in changed_tensors().items():
        digests[what] = write(tmp_path / what.replace("/", "."), tensors={**tensors(), **change}).digest()
    assert len(digests) == 13 and len(set(digests.values())) == len(digests)


@pytest.mark.parametrize("change", [{"step": 21}, {"data": {"batches": 21, "cursors": {}}}, {"scalers": {"gpt": {"scale": 4}}}])
def test_digest_changes_with_the_state(change: dict[str, Any], tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest() != write(tmp_path / "b", state={**STATE, **change}).digest()


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


# --- from several writers, and from an earlier format ----------------------------------------------------------------

def write_in_parts(folder: Path, cuts: list[list[float]]) -> Checkpoint:
    """As processes would that have the stretches between these shares of every tensor; a cut at 0 or 1 leaves one with none."""
    folder.mkdir(exist_ok=True)
    partial, files = new_partial(folder, 20), {}
    for name, values in tensors().items():
        for rank, (begin, end) in enumerate(cuts):
            pieces = []
            for key, value in values.items():
                first, last = int(begin * value.numel()), int(end * value.numel())
                if value.numel() or rank == 0:
                    pieces.append(Piece(key, tuple(value.shape), first, value.reshape(-1)[first:last]))
            buffer, file = TensorBuffer(), part_name(name, rank, len(cuts))
            buffer.take(pieces)
            (partial / file).parent.mkdir(exist_ok=True)
            files[file] = buffer.write(partial / file)
    return commit(partial, 20, files, STATE, "run: {}\n", {})


CUTS = {"two": [[0, 0.5], [0.5, 1]], "three, one has none": [[0, 0.3], [0.3, 0.3], [0.3, 1]],
        "the last first": [[0.7, 1], [0, 0.2], [0.2, 0.7]]}


@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_of_several_writers_are_read_as_whole_tensors(cuts: str, tmp_path: Path) -> None:
    alone, parts = write(tmp_path / "alone"), write_in_parts(tmp_path / "parts", CUTS[cuts])
    assert parts.problem() is None and parts.digest() == alone.digest()
    assert parts.networks() == alone.networks() == ["critic", "gpt"]
    for name, values in tensors().items():
        read = parts.tensors(*name.split("/"))
        assert read.keys() == sorted(values) and read.types() == {key: value.dtype for key, value in values.items()}
        assert read.shapes() == {key: tuple(value.shape) for key, value in values.items()}
        assert all(torch.equal(read(key), value) for key, value in values.items())
    with pytest.raises(ValueError, match="has no tensor nonesuch"):
        read("nonesuch")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    found = write_in_parts(tmp_path, CUTS["two"])
    second = found.path / "networks" / "gpt-00002-of-00002.safetensors"
    flip_last_bit(second)
    assert found.problem() == "networks/gpt-00002-of-00002.safetensors is damaged (SHA-256 differs)" and found.has_its_files()
    second.unlink()
    assert found.problem() == "networks/gpt-00002-of-00002.safetensors is missing" and not found.has_its_files()
    with pytest.raises(UserError, match=r"gpt-00001-of-00002.safetensors: of a.weight the elements from 6 on are missing"):
        found.tensors("networks", "gpt")("a.weight")
    (found.path / "networks" / "gpt-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        found.tensors("networks", "gpt")


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """As genscale wrote it before there were parts: one file each, and nothing about what made it."""
    old = tmp_path / "old" / "step-00000020"
    for name, values in tensors().items():
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(values, old / f"{name}.safetensors")
    (old / "state.json").write_text(json.dumps(STATE, indent=1))
    (old / "config.yaml").write_text("run: {}\n")
    files = {str(file.relative_to(old)): {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in sorted(old.rglob("*")) if file.is_file()}
    (old / "manifest.json").write_text(json.dumps({"format": 1, "step": 20, "files": files}, indent=1))
    found = Checkpoint(old)
    assert found.problem() is None and latest_valid(old.parent, lambda _: None) == found
    assert found.digest() == write(tmp_path / "new").digest()


def test_the_files_are_what_safetensors_reads_and_writes(tmp_path: Path) -> None:
    found = write(tmp_path)
    for name, values in tensors().items():
        read = load_file(found.path / f"{name}.safetensors")
        assert read.keys() == values.keys()
        assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in values.items())


def test_what_a_user_means_by_a_path(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = write(run / "checkpoints", 10), write(run / "checkpoints", 20)
    assert list(find_checkpoints(run)) == list(find_checkpoints(run / "checkpoints")) == [first, second]
    assert list(find_checkpoints(first.path)) == [first]
    renamed = Checkpoint(Path(shutil.copytree(first.path, tmp_path / "my best")))
    assert list(find_checkpoints(renamed.path)) == [renamed] and renamed.step == 10 and renamed.digest() == first.digest()
    for nothing in (tmp_path, run / "checkpoints" / "step-00000030", tmp_path / "absent"):
        with pytest.raises(UserError, match="no checkpoint here"):
            list(find_checkpoints(nothing))


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path).digest()
    with pytest.raises(TypeError):  # in the middle: the tensors are written before the state
        write(tmp_path, state={"step": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    assert Checkpoint(tmp_path / "step-00000020").digest() == before
    with pytest.raises(UserError, match="cannot be read"):
        TensorFiles([tmp_path / "absent.safetensors"])
