"""Checkpoints: whole or absent, equal digests for equal content, whoever has written them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints, latest_valid
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
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
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
