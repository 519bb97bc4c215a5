"""What `genscale slurm status` and `logs` say of runs, from run folders and a queue as squeue shows it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from genscale.cluster.job_logs import _show_news, files
from genscale.cluster.job_records import Submitted, new_folder, record
from genscale.cluster.job_status import row_of, table
from genscale.cluster.slurm_commands import Queued

RUNNING = Queued("7", "RUNNING", "None", "node[0-1]", "1:30:00")


@pytest.fixture
def submitted(run):
    """The run of job 7, of 100 steps."""
    kept = new_folder(run)
    (kept / "config.yaml").write_text("train: {steps: 100}\n")
    (run / "logs").mkdir()
    record(run, Submitted("7", str(kept), str(run / "logs" / "slurm-7.log"), (str(run),)))
    return run


def log_steps(run, first, last, seconds):
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {"step": step, "loss": 5 - step / 100, "tokens_per_second": 1500.4, "step_seconds": seconds}
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"step": last, "validation_loss": 9.0}) + "\n")


def test_a_job_in_the_queue(submitted):
    other = Queued("6", "RUNNING", "None", "node0", "1:00")
    row = row_of(submitted, [other, Queued("7", "PENDING", "Resources", "", "1:00:00")])
    assert (row.job, row.state, row.note, row.lives, row.step, row.steps) == ("7", "queued", "Resources", 0, 0, 100)
    assert (row.loss, row.speed, row.time_left, row.predicted) == (None, None, None, None)


@pytest.mark.parametrize(("reason", "released"), [
    ("launch failed requeued held", True), ("JobHeldUser", True), ("JobHeldAdmin", False), ("Resources", False)])
def test_a_job_that_is_held_says_how_it_is_released(reason, released, submitted):
    note = row_of(submitted, [Queued("7", "PENDING", reason, "", "1:00:00")]).note
    assert note == reason + (f"; once you know why: genscale slurm release {submitted}" if released else "")


def test_a_job_that_runs_and_when_the_run_will_be_done(genscale, submitted, in_job, checkpoint_at):
    in_job("7")
    genscale("slurm", "begin", submitted)
    log_steps(submitted, 1, 30, seconds=9.0)
    log_steps(submitted, 31, 50, seconds=2.0)  # the latest count
    checkpoint_at(40)
    row = row_of(submitted, [RUNNING])
    assert (row.state, row.note, row.lives, row.step, row.loss) == ("running", "node[0-1]", 1, 50, 4.5)
    assert (row.speed, row.time_left, row.predicted) == ("1,500 tokens/s", "1:30:00", 100.0)
    shown = table([row]).splitlines()
    assert shown[0].split()[:6] == ["RUN", "JOB", "STATE", "LIVES", "STEP", "LOSS"]
    ends = [datetime.now() + timedelta(seconds=seconds) for seconds in (40, 100)]  # the minute may just have passed
    assert "50/100" in shown[1] and any(f"{end:%H:%M}" in shown[1] for end in ends)


def test_a_job_that_waits_for_its_next_life(genscale, submitted, in_job, checkpoint_at, say_ended):
    in_job("7")
    genscale("slurm", "begin", submitted)
    checkpoint_at(40)
    say_ended("stopped", 138, 40)
    genscale("slurm", "end", submitted, "--code", 138)
    row = row_of(submitted, [Queued("7", "PENDING", "BeginTime", "", "1:00:00")])
    assert (row.state, row.note, row.step, row.lives) == ("requeued", "BeginTime", 40, 1)


@pytest.mark.parametrize(("how", "code", "note"), [
    ("complete", 0, "complete"), ("failed", 2, "failed: data.source: gone; not requeued: it would fail again"),
])  # fmt: skip
def test_a_job_that_has_ended(how, code, note, genscale, submitted, in_job, say_ended):
    in_job("7")
    genscale("slurm", "begin", submitted)
    say_ended(how, code, 100, reason="data.source: gone" if code else None)
    genscale("slurm", "end", submitted, "--code", code)
    row = row_of(submitted, [])
    assert (row.state, row.note) == ("ended", note)


def test_logs_show_what_comes_and_nothing_twice(submitted, capsys):
    log = submitted / "logs" / "slurm-7.log"
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    (submitted / "logs" / "rank-00001.log").write_text("of rank 1\n")
    assert files(submitted, ranks=False) == [log]
    assert files(submitted, ranks=True) == [log, submitted / "logs" / "rank-00001.log"]
    places = {}
    for news in ("", "", "line", " 9\nli", "ne 10"):  # a line may come in parts, and the last one never end
        with log.open("a") as file:
            file.write(news)
        _show_news(log, places, lines=2, named=news.startswith(" "), ended=news == "ne 10")
    assert capsys.readouterr().out == "line 7\nline 8\nslurm-7.log: line 9\nline 10\n"


def test_runs_are_found_here_and_on_the_scratch_disk_of_the_site(genscale, tool, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    site = tmp_path / "config" / "genscale" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("scratch: $DISK/me\n")
    for name in ("squeue", "scontrol", "sacct"):
        tool(name, "exit 0")
    assert f"no run in runs/ or {tmp_path}/disk/me/runs/ has a job" in genscale("slurm", "status").message()
    runs = [Path("runs/near"), tmp_path / "disk" / "me" / "runs" / "far"]
    for run in runs:
        record(run, Submitted("7", str(new_folder(run)), None, (str(run),)))
    assert {line.split()[0] for line in genscale("slurm", "status").out.splitlines()[1:]} == set(map(str, runs))
