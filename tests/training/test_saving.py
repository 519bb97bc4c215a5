"""Saving in the background: what is saved is the step's, one save at a time, and a save that fails costs a warning."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.checkpoint import saving
from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.checkpoint.saving import Contents, Saver
from genscale.checkpoint.writing import clear_leftovers, write_checkpoint
from genscale.errors import CheckpointNotWritten, UserError
from genscale.parallel.pieces import pieces_of
from genscale.parallel.processes import Processes
from genscale.testing.processes import clean_environment

STATE = {"step": 1, "data": {"batches": 0, "cursors": {}}, "scalers": {}, "plan": {}}


@pytest.fixture(scope="module")
def alone() -> Processes:
    return Processes()


def contents(step: int, last: bool = False) -> Contents:
    return Contents(step, STATE, "run: {}\n", {}, best_step=None, last=last)


def pieces(**tensors: torch.Tensor) -> dict[str, Any]:
    return {"networks/gpt": pieces_of(tensors.items(), 0, 1)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_the_step_and_not_what_follows(alone: Processes, tmp_path: Path) -> None:
    saver, weight = Saver(tmp_path / "a", alone, keep=3), torch.randn(300, 200)
    channels_last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    kept = {"w": weight.clone(), "image": channels_last.clone(), "count": torch.tensor(3), "half": torch.ones(5).bfloat16()}
    expected = write_checkpoint(tmp_path / "b", 1, {"networks/gpt": kept}, STATE, "run: {}\n").digest()
    saver.start(pieces(w=weight, image=channels_last, count=kept["count"], half=kept["half"]), contents(1))
    weight.zero_()
    channels_last.zero_()
    assert saver.settle() is True and saver.settle() is None
    assert Checkpoint(tmp_path / "a" / "step-00000001").digest() == expected
    # The memory of the save before is used again, for less and for more.
    for step, size in ((2, 10), (3, 1000)):
        saver.start(pieces(w=torch.full((size,), float(step))), contents(step))
        assert saver.settle()
        read = Checkpoint(tmp_path / "a" / f"step-{step:08d}").tensors("networks", "gpt")
        assert read.keys() == ["w"] and torch.equal(read("w"), torch.full((size,), float(step)))


def test_a_failed_save_is_one_warning_and_a_failed_last_one_an_error(alone, small_disk, tmp_path, caplog) -> None:
    disk = small_disk("3m")
    saver = Saver(disk / "checkpoints", alone, keep=3)
    saver.start(pieces(w=torch.randn(100_000)), contents(10))
    assert saver.settle()
    good = Checkpoint(disk / "checkpoints" / "step-00000010")
    digest = good.digest()
    with caplog.at_level(logging.WARNING, logger="genscale"):
        saver.start(pieces(w=torch.randn(1_000_000)), contents(20))
        assert saver.settle() is False
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "step-00000020 could not be written: No space left on device; training goes on" in warning
    assert str(good.path) in warning
    saver.start(pieces(w=torch.randn(1_000_000)), contents(20, last=True))
    with pytest.raises(CheckpointNotWritten, match=f"step-00000020 could not be written: No space .*checkpoint: {good.path}"):
        saver.settle()
    assert len(caplog.records) == 1
    assert names(disk / "checkpoints") == ["step-00000010"] and good.digest() == digest and good.problem() is None
    saver.start(pieces(w=torch.randn(50_000)), contents(30))
    assert saver.settle()
    shutil.rmtree(disk / "checkpoints")
    (disk / "checkpoints").write_text("")  # no folder any more
    saver.start(pieces(w=torch.randn(10)), contents(40))
    assert saver.settle() is False


def test_a_save_on_its_way_is_progress_for_the_watchdog(alone: Processes, tmp_path: Path) -> None:
    """A slow disk is no hang, when the run waits for its last checkpoint."""
    saver, before = Saver(tmp_path, alone, keep=3), alone.writes
    saver.start(pieces(w=torch.ones(3)), contents(1))
    assert saver.settle() and alone.writes > before


def test_a_disk_that_cannot_even_be_listed_holds_nobody_up(alone, small_disk, monkeypatch, caplog) -> None:
    def lost(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "list_checkpoints", lost)
    saver = Saver(small_disk("1m"), alone, keep=3)
    saver.start(pieces(w=torch.randn(1_000_000)), contents(10))
    assert saver.settle() is False
    assert "last good checkpoint: unknown (Input/output error)" in caplog.text


def test_a_run_folder_that_is_another_run_s_by_now(alone: Processes, tmp_path: Path) -> None:
    def taken_over() -> None:
        raise UserError("run.name: taken over")

    saver = Saver(tmp_path, alone, keep=3, may_commit=taken_over)
    saver.start(pieces(w=torch.ones(3)), contents(1))
    with pytest.raises(UserError, match="taken over"):
        saver.settle()
    assert names(tmp_path) == []


def test_a_run_that_is_taken_over_while_it_commits_deletes_nothing(alone: Processes, tmp_path: Path) -> None:
    looks = iter([None, None, None, UserError("run.name: taken over")])

    def taken_over_at_the_last_look() -> None:
        if error := next(looks):
            raise error

    saver = Saver(tmp_path, alone, keep=1, may_commit=taken_over_at_the_last_look)
    saver.start(pieces(w=torch.ones(3)), contents(1))
    assert saver.settle()
    saver.start(pieces(w=torch.ones(3)), contents(2))
    with pytest.raises(UserError, match="taken over"):
        saver.settle()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_two_saves_of_a_step_from_two_lives_of_a_run(alone: Processes, tmp_path: Path) -> None:
    first, second = Saver(tmp_path, alone, keep=3), Saver(tmp_path, alone, keep=3)
    first.start(pieces(w=torch.zeros(2_000_000)), contents(5))
    second.start(pieces(w=torch.ones(2_000_000)), contents(5))
    ends = [first.settle(), second.settle()]
    assert any(ends), "one of them has its checkpoint"
    clear_leftovers(tmp_path)
    (left,) = list_checkpoints(tmp_path)
    assert left.problem() is None and left.tensors("networks", "gpt")("w").unique().numel() == 1


def test_a_replaced_checkpoint_is_put_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, 5, {"networks/gpt": {"w": torch.ones(3)}}, STATE, "run: {}\n")
    made.path.rename(tmp_path / f".partial-replaced-{made.path.name}-0a1b2c3d")
    (tmp_path / ".partial-step-00000005-elsewhere-1-0a1b2c3d").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000005"] and made.problem() is None


def test_the_thread_ends_with_the_save(alone: Processes, tmp_path: Path) -> None:
    saver = Saver(tmp_path, alone, keep=1)
    saver.start(pieces(w=torch.ones(3)), contents(1))
    saver.finish()
    assert [thread for thread in threading.enumerate() if thread.name == "checkpoint"] == []
    assert names(tmp_path) == ["step-00000001"]


def test_two_processes_one_of_which_fails_and_is_killed(tmp_path: Path) -> None:
    root, worker = Path(__file__).resolve().parents[2], Path(__file__).with_name("saving_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        shape = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
        command = [sys.executable, str(worker), str(tmp_path / "checkpoints")]
        running.append(subprocess.Popen(command, env=clean_environment(shape), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True))
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode == 0, outputs
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["saved"] is second["saved"] is True and first["failed"] is second["failed"] is False
    (warning,) = first["warnings"]
    assert "step-00000020 could not be written: process 1: File too large; training goes on" in warning
    assert second["warnings"] == []
    for ends in (first, second):
        assert "step-00000030 could not be written: process 1: File too large; last good checkpoint: " in ends["last"]
        assert ends["after"] == ["step-00000010"] and ends["mended"] is True
    assert first["problem"] is None and first["alike"] is True
    parts = [f"{kind}/gpt-0000{number}-of-00002.safetensors" for kind in ("networks", "optimizers") for number in (1, 2)]
    assert first["files"] == sorted([*parts, "config.yaml", "state.json"])
    assert first["seconds"] < 60 and len(first["killed"]) == 3, first
    assert first["cleared"] == ["step-00000010", "step-00000040"] and first["problems"] == [None, None]
