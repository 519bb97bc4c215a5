"""A run folder that others can write to: what a run writes there lands in no other place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genscale.cluster import job_records, lives
from genscale.errors import UserError
from genscale.supervise.ending import Ending
from genscale.supervise.run_folder import create_run_folder
from genscale.tracking.metrics_file import MetricsFile, read_metrics
from genscale.tracking.run_logging import setup_logging
from genscale.tracking.wandb_tracker import _run_id
from genscale.writing import drafted, no_link, write_whole

WHOLE = ("config.yaml", "tokenizer.json", "samples/step-00000002.txt", "plots/loss.png", "ended.json")


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A file of the user's own that links lead to."""
    file = tmp_path / "precious"
    file.write_text("precious\n")
    return file


def plant(run: Path, elsewhere: Path, *names: str) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(elsewhere)


def test_links_in_the_place_of_files_are_replaced_not_followed(genscale, tiny_config, tiny_run, elsewhere) -> None:
    plant(tiny_run, elsewhere, *WHOLE, ".ended-0-1", "metrics.jsonl.tmp")
    done = genscale("train", "--config", tiny_config, "--train.steps", 4, "--train.sample_every", 2)
    assert done.code == 0, done.err
    assert elsewhere.read_text() == "precious\n"
    for name in WHOLE:
        assert (tiny_run / name).is_file() and not (tiny_run / name).is_symlink(), name
    assert not [path.name for path in tiny_run.rglob(".*") if path.name.startswith((".new-", ".config", ".probe"))]


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-00000.log"])
def test_a_link_that_would_be_appended_to_is_one_line(genscale, tiny_config, tiny_run, elsewhere, name) -> None:
    plant(tiny_run, elsewhere, name)
    done = genscale("train", "--config", tiny_config)
    assert f"{Path(name).name} is a link, and nothing is written through one" in done.message_of_run()
    assert elsewhere.read_text() == "precious\n"


@pytest.mark.parametrize("mode", ["w", "a"])
def test_neither_is_one_emptied(tmp_path, elsewhere, mode) -> None:
    plant(tmp_path, elsewhere, "link")
    with pytest.raises(OSError, match="is a link"), open(tmp_path / "link", mode, opener=no_link):
        pass
    assert elsewhere.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["logs", "plots", "samples", "checkpoints", "wandb", "tensorboard", "profile", ".owner"])
def test_a_link_in_the_place_of_a_folder_is_one_line(tmp_path, name, refuse, tiny_run) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tiny_run.mkdir(parents=True)
    (tiny_run / name).symlink_to(other)
    assert refuse().startswith(f"run.dir: {tiny_run / name} is a link, and nothing is written through one")
    assert not list(other.iterdir())


def test_run_folders_that_are_links_as_a_whole_work(genscale, tiny_config, tmp_path) -> None:
    """As clusters with a scratch disk have them: runs -> scratch/runs, or one run of it."""
    (tmp_path / "scratch" / "one").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "tiny").symlink_to(tmp_path / "scratch" / "one")
    done = genscale("train", "--config", tiny_config, "--train.steps", 2)
    assert done.code == 0, done.err
    assert (tmp_path / "scratch" / "one" / "config.yaml").is_file()


def in_jobs(run: Path) -> dict[str, Callable[[], object]]:
    """What the scripts of jobs write."""
    entry = job_records.Submitted("7", "kept", None, (str(run),))
    return {"jobs/jobs.json": lambda: job_records.record(run, entry),
            "jobs/lives.json": lambda: lives.write_lives(run, []),
            "jobs/events.log": lambda: lives.tell(run, "7", "a word"),
            "wandb/run_id": lambda: _run_id(run / "wandb"),
            "ended.json": lambda: Ending(run, 0).claim("complete", 0)}


@pytest.mark.parametrize("name", ["jobs/jobs.json", "jobs/lives.json", "jobs/events.log", "wandb/run_id", "ended.json"])
def test_what_jobs_write_goes_through_no_link(tmp_path, elsewhere, name) -> None:
    plant(tmp_path / "run", elsewhere, name)
    elsewhere.write_text("" if name == "wandb/run_id" else "precious\n")  # where a number would be taken over
    before = elsewhere.read_text()
    with contextlib.suppress(UserError):  # which an identity that is a link is
        in_jobs(tmp_path / "run")[name]()
    assert elsewhere.read_text() == before


def test_a_folder_of_jobs_that_is_a_link_is_one_line(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "jobs").symlink_to(tmp_path / "other")
    for make in (lambda: job_records.new_folder(tmp_path / "run"), in_jobs(tmp_path / "run")["jobs/jobs.json"]):
        with pytest.raises(UserError, match="jobs is a link, and nothing is written through one"):
            make()
    assert not list((tmp_path / "other").iterdir())


def test_the_log_of_a_link_is_not_written(tmp_path, elsewhere) -> None:
    plant(tmp_path, elsewhere, "logs/rank-00000.log")
    with pytest.raises(UserError, match="rank-00000.log is a link"):
        setup_logging(tmp_path, 0)


def test_a_pipe_as_metrics_is_one_line_and_no_wait(tmp_path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl is a named pipe, not a plain file"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot write to"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_files_are_written_whole_with_the_rights_that_files_have(tmp_path, monkeypatch) -> None:
    before = os.umask(0o027)
    try:
        create_run_folder(tmp_path / "run")
        file = tmp_path / "run" / "a.json"
        write_whole(file, json.dumps({"a": "ü"}))
        with drafted(tmp_path / "run" / "b.npy") as draft, draft.open("wb") as opened:
            np.save(opened, np.arange(3))
    finally:
        os.umask(before)
    assert file.read_text(encoding="utf-8") == '{"a": "\\u00fc"}'
    assert {stat.S_IMODE(path.stat().st_mode) for path in (file, file.with_name("b.npy"))} == {0o640}
    with pytest.raises(RuntimeError), drafted(file) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert file.read_text().startswith("{") and sorted(path.name for path in file.parent.iterdir()) == sorted(
        ["a.json", "b.npy", "checkpoints", "samples", "plots", "logs"])
    shutil.rmtree(tmp_path / "run")
