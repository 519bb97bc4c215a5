"""`genscale slurm status`, `logs`, `cancel` on run folders that strangers have made: a line, and nothing but numbers of jobs
handed to Slurm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from genscale.cluster.job import JobSettings, settle
from genscale.cluster.job_logs import MOST, _show_news
from genscale.cluster.job_records import jobs_of, submitted
from genscale.cluster.lives import read_ended, read_lives
from genscale.cluster.site import Site
from genscale.errors import UserError
from genscale.supervise.run_owner import RunOwner, who_has

LIFE = {"job": "7", "restart": 0, "nodes": ["n0"], "began": "2025-01-01T00:00:00+00:00", "step": 0, "how": "failed",
        "reason": "no\x1b[2J\nforged"}
SUBMITTED = {"job": "7", "kept": "/kept", "log": None, "runs": []}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def slurm(tool, tmp_path) -> Path:
    """What Slurm's commands were given, a line each."""
    heard = tmp_path / "heard"
    heard.touch()
    for name in ("squeue", "scontrol", "sacct", "scancel"):
        tool(name, f'printf "%s\\n" "{name} $*" >> {heard}')
    return heard


def write(run: Path, name: str, content: Any) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(content if isinstance(content, str) else json.dumps(content))


HOSTILE = {
    "options as jobs": {"jobs/jobs.json": {"jobs": [{**SUBMITTED, "job": "-u mallory"}]},
                        "jobs/lives.json": {"lives": [{**LIFE, "job": "--user=mallory"}]}},
    "a shell's text": {"jobs/lives.json": {"lives": [{**LIFE, "job": "7;touch owned"}]}},
    "no text": {"jobs/lives.json": {"lives": [{**LIFE, "job": 7, "nodes": "n0", "step": "many"}]}},
    "nothing of the kind": {"jobs/lives.json": [1, 2], "jobs/jobs.json": {"jobs": {"job": "7"}}, "ended.json": "7"},
    "towers": {"jobs/lives.json": DEEP, "jobs/jobs.json": DEEP, "ended.json": DEEP, "metrics.jsonl": DEEP + "\n",
               "config.yaml": DEEP},
    "metrics of texts": {"metrics.jsonl": '{"step": 1, "loss": "x\\u001b[2J", "step_seconds": [], "tokens_per_second": {}}\n',
                         "jobs/lives.json": {"lives": [LIFE]}},
    "metrics without bounds": {"metrics.jsonl": '{"step": 1, "loss": 1e999, "step_seconds": 1e308, "x_per_second": 1e300}\n',
                               "config.yaml": "train: {steps: 1000000000000}", "jobs/lives.json": {"lives": [LIFE]}},
    "an end of another kind": {"ended.json": {"how": ["complete"], "exit_code": "x"}, "jobs/lives.json": {"lives": [LIFE]}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_status_of_a_strangers_folder_is_a_row_and_slurm_hears_numbers_alone(genscale, run, slurm, case) -> None:
    (run / "jobs").mkdir(parents=True, exist_ok=True)
    for name, content in HOSTILE[case].items():
        write(run, name, content)
    done = genscale("slurm", "status", run)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2 and "\x1b" not in done.out + done.err
    assert not any(word in slurm.read_text() for word in ("mallory", "touch"))
    said = genscale("slurm", "cancel", run).message()
    assert said.startswith("genscale slurm cancel: no job of ") and "scancel" not in slurm.read_text()


@pytest.mark.parametrize("name", ["jobs/lives.json", "jobs/jobs.json", "ended.json", "metrics.jsonl", "config.yaml"])
def test_pipes_in_the_place_of_files_hold_nobody_up(genscale, run, slurm, name) -> None:
    (run / "jobs").mkdir(parents=True, exist_ok=True)
    os.mkfifo(run / name)
    started = time.monotonic()
    assert genscale("slurm", "status", run).code == 0
    assert time.monotonic() - started < 5


def test_floods_and_lies_are_no_records(run) -> None:
    write(run, "jobs/lives.json", {"lives": [LIFE]})
    assert [life.job for life in read_lives(run)] == ["7"]
    write(run, "jobs/lives.json", {"lives": [{**LIFE, "new": 1}]})  # of a later version, as a job with a copy of it writes them
    assert [life.job for life in read_lives(run)] == ["7"]
    for wrong in ({"job": "7 8"}, {"job": "\u0667"}, {"restart": "0"}, {"nodes": [1]}, {"how": 1}):
        write(run, "jobs/lives.json", {"lives": [{**LIFE, **wrong}]})
        assert not read_lives(run), wrong
    for wrong in ({"runs": [1]}, {"kept": None}, {"log": 1}, {"job": "-u"}):
        write(run, "jobs/jobs.json", {"jobs": [{**SUBMITTED, **wrong}]})
        assert not submitted(run) and not jobs_of(run), wrong
    with (run / "ended.json").open("w") as file:
        file.write('{"how": "complete", "exit_code": 0}')
        file.truncate(2**40)
    assert read_ended(run) is None


def test_logs_show_the_end_of_a_flood(tmp_path, capsys) -> None:
    log = tmp_path / "rank-00000.log"
    with log.open("wb") as file:
        file.seek(3 * MOST)
        file.write(b"\nthe\x1b[2J last\n")
    places: dict[Path, int] = {}
    _show_news(log, places, 1, named=False, ended=True)
    assert places[log] == log.stat().st_size and "last" in capsys.readouterr().out


@pytest.mark.parametrize("content", [DEEP, "[]", '{"token": 1}', json.dumps({"token": "t", "pid": -1, "started": "x"})])
def test_a_claim_that_is_none_keeps_no_run_out(run, content, monkeypatch) -> None:
    monkeypatch.setattr("genscale.supervise.run_owner.EMPTY_SECONDS", 0.0)
    write(run, ".owner/00000003.json", content)
    write(run, ".owner/².json", "{}")
    assert who_has(run) is None
    assert RunOwner(run, print).number == 4


def test_a_container_stands_on_one_line_of_the_script() -> None:
    with pytest.raises(UserError, match="--container: .* is not a path that a job's script can hold"):
        settle(JobSettings(container="image.sif\nrm -rf x"), Site(), "run")
