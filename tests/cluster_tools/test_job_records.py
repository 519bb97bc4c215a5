"""Jobs and runs are found again: from other folders, of arrays, submitted by hand, and beside files that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from genscale.cluster import job_logs
from genscale.cluster.job_logs import files
from genscale.cluster.job_records import Submitted, new_folder, record, runs_of
from genscale.cluster.job_status import row_of
from genscale.cluster.slurm_commands import Queued


@pytest.fixture
def array(tmp_path, monkeypatch) -> Path:
    """Job 12, an array of two runs, submitted in <tmp_path>/here for the run.dir `runs`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    array, runs = Path("runs/tiny"), (Path("runs/tiny-seed0"), Path("runs/tiny-seed1"))
    kept = new_folder(array)
    (kept / "config.yaml").write_text("train: {steps: 100}\n")
    (array / "logs").mkdir()
    record(array, Submitted("12", str(kept), None, tuple(map(str, runs))))
    for index, run in enumerate(runs):
        log = array / "logs" / f"slurm-12_{index}.log"
        log.write_text("")
        record(run, Submitted(f"12_{index}", str(kept), str(log), (str(run),)))
    return array


def test_what_was_submitted_in_one_folder_is_shown_from_another(array, monkeypatch, tmp_path):
    assert runs_of([array]) == [Path("runs/tiny-seed0"), Path("runs/tiny-seed1")]
    monkeypatch.chdir(array)
    assert runs_of([Path()]) == [Path("../tiny-seed0"), Path("../tiny-seed1")]
    monkeypatch.chdir(tmp_path)
    runs = runs_of([Path("here/runs/tiny")])
    assert runs == [Path("here/runs/tiny-seed0"), Path("here/runs/tiny-seed1")]
    assert row_of(runs[1], [Queued("12_1", "RUNNING", "None", "node0", "1:00")]).steps == 100
    assert [file.name for file in files(Path("here/runs/tiny"), ranks=False)] == ["slurm-12_0.log", "slurm-12_1.log"]


def test_a_run_folder_may_be_reached_by_a_link(array, monkeypatch):
    Path("latest").symlink_to(array.absolute())
    assert runs_of([Path("latest")]) == [Path("runs/tiny-seed0"), Path("runs/tiny-seed1")]


def test_with_an_array_the_jobs_end_that_its_runs_were_given_later(array, genscale, tool, tmp_path):
    run = runs_of([array])[1]
    record(run, Submitted("20", str(new_folder(run)), None, (str(run),)))
    tool("squeue", 'echo "20|RUNNING|None|node0|1:00"; echo "21|RUNNING|None|node0|1:00"')
    tool("scancel", f'echo "$@" >> {tmp_path}/cancelled')
    assert genscale("slurm", "cancel", array).out == "cancelled job 20 (running)\n"
    assert (tmp_path / "cancelled").read_text() == "20\n"


def test_a_job_on_its_way_back_into_the_queue_is_not_at_its_end(run, genscale, tool, in_job, say_ended):
    """Slurm shows one that is requeued as completing until its nodes are free."""
    tool("squeue", "echo '7|COMPLETING|None|node0|0:00'")
    tool("scancel", "exit 0")
    for restart, how in ((0, "stopped"), (1, "complete")):
        in_job("7", restart)
        genscale("slurm", "begin", run)
        say_ended(how, 0)
        genscale("slurm", "end", run)
        cancelled = genscale("slurm", "cancel", run)
        if how == "stopped":
            assert cancelled.out == "cancelled job 7 (completing)\n", cancelled.err
        else:
            assert f"no job of {run} is in the queue" in cancelled.message()


@pytest.mark.parametrize(("file", "text"), [
    ("jobs/lives.json", '{"lives": [{"job": "12_0"}]}'), ("ended.json", '{"step": 3}'),
    ("config.yaml", "train: {steps: [\n"), ("config.yaml", "a\n"), ("metrics.jsonl", '{"step": 1, \n{"step": 2}\n'),
])  # fmt: skip
def test_a_damaged_file_of_one_run_does_not_hide_the_others(file, text, array, genscale, tool):
    broken, whole = runs_of([array])
    (broken / file).write_text(text)
    if file == "config.yaml":
        (array / "jobs" / "0001" / "config.yaml").unlink()
    tool("squeue", "echo '12_1|RUNNING|None|node0|1:00'")
    tool("scontrol", "exit 1")
    tool("sacct", "exit 1")
    shown = genscale("slurm", "status", broken, whole)
    assert shown.code == 0, shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[1:]] == [str(broken), str(whole)]
    assert ("metrics.jsonl" in shown.out) == (file == "metrics.jsonl"), shown.out


def test_logs_of_a_job_that_was_submitted_by_hand(run, genscale, tool, in_job, tmp_path, monkeypatch):
    """Where it prints to only Slurm knows, which is not asked at each poll."""
    in_job("7")
    assert genscale("slurm", "begin", run).code == 0
    log = tmp_path / "my logs" / "tiny-7.log"
    log.parent.mkdir()
    log.write_text("step 1\n")
    tool("squeue", f'[ -e {tmp_path}/asked ] || echo "7|RUNNING|None|node0|1:00"; touch {tmp_path}/asked')
    tool("scontrol", f"echo x >> {tmp_path}/shown; printf 'JobId=7 JobName=tiny\\n   StdIn=/dev/null\\n   StdOut={log}\\n\\n'")
    monkeypatch.setattr(job_logs, "QUEUE_SECONDS", 2.5)
    followed = genscale("slurm", "logs", run)
    assert followed.out == "step 1\n", followed.err
    assert len((tmp_path / "shown").read_text().split()) == 2
