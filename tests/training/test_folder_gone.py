"""A run whose folder is moved or deleted notices, says so and ends; nothing of it comes to be in the old place."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from genscale.checkpoint.writing import new_partial
from genscale.supervise.run_owner import FolderGone, RunOwner


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def test_a_folder_that_is_moved_is_followed_and_may_come_back(run, tmp_path):
    owner, moved = RunOwner(run, print), tmp_path / "a new place"
    run.rename(moved)
    for ask in (owner.check, owner.beat):
        with pytest.raises(FolderGone, match=f"{run} was moved to {moved}") as gone:
            ask()
        assert gone.value.now == moved
    with pytest.raises(FileNotFoundError):
        new_partial(run / "checkpoints", 1)
    assert not run.exists()
    moved.rename(run)
    owner.beat()
    owner.release()
    assert json.loads(next((run / ".owner").glob("*.json")).read_text())["released"]


def test_a_folder_that_was_moved_is_released_where_it_is(run, tmp_path):
    """Whoever puts it back goes on at once, from another node too."""
    owner = RunOwner(run, print)
    run.rename(tmp_path / "moved")
    owner.release()
    assert not run.exists()
    assert json.loads(next((tmp_path / "moved" / ".owner").glob("*.json")).read_text())["released"]


def test_a_folder_that_is_deleted_is_not_made_anew(run):
    owner = RunOwner(run, print)
    shutil.rmtree(run)
    with pytest.raises(FolderGone) as gone:
        owner.beat()
    assert gone.value.now is None
    owner.release()
    assert not run.exists()


def test_a_copy_in_its_place_is_another_folder(run, tmp_path):
    owner = RunOwner(run, print)
    run.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", run)
    with pytest.raises(FolderGone):
        owner.check()
    owner.release()


@pytest.mark.slow
@pytest.mark.parametrize("moved", [True, pytest.param(False, marks=pytest.mark.matrix)], ids=["moved", "deleted"])
def test_a_run_ends_when_its_folder_is_gone(moved, tiny_config, tiny_run, genscale_start, genscale_finish):
    process = genscale_start("train", "--config", tiny_config, "--train.steps", 10**6, "--guards.hang_minutes", 0.1,
                             "--train.sample_every", 50, "--train.checkpoint_every", 50, "--tracking.wandb", "offline",
                             "--train.log_every", 100)
    deadline = time.monotonic() + 60
    while not all(map(list, (tiny_run.glob("checkpoints/step-*"), tiny_run.glob("wandb/offline-run-*/*.wandb")))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    doomed = tiny_run.with_name("doomed")
    tiny_run.rename(doomed)
    if not moved:
        shutil.rmtree(doomed)
    done = genscale_finish(process, 60)
    assert "moved" in done.message_of_run() and f"warning: {tiny_run} was moved" in done.err
    assert not tiny_run.exists() and doomed.exists() == moved
    if moved:
        ended = json.loads((doomed / "ended.json").read_text())
        assert (ended["how"], ended["exit_code"]) == ("failed", 2) and str(doomed) in ended["reason"]
        assert json.loads(max((doomed / ".owner").glob("0*.json")).read_text())["released"]
