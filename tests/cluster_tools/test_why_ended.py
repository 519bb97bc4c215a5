"""Why a life has ended of which its run has said nothing: from what the job has printed, from Slurm, from an exit code."""

from __future__ import annotations

import json
import socket

import pytest

from genscale.cluster import ports
from genscale.cluster.checks import host_name
from genscale.cluster.job_records import Submitted, new_folder, record
from genscale.cluster.job_status import row_of
from genscale.cluster.lives import read_lives
from genscale.cluster.ports import free_port
from genscale.cluster.slurm_commands import Queued
from genscale.cluster.why_ended import reason_in
from genscale.errors import PortTaken
from genscale.parallel.processes import Processes
from genscale.supervise.ending import before_the_run
from genscale.supervise.run_owner import RunOwner

PORT = ("ConnectionError: Tried to launch distributed communication on port `20007`, but another process is utilizing it. "
        "Please specify a different port")
CANCELLED = "slurmstepd: error: *** JOB 7 ON node0 CANCELLED AT 2026-01-01T00:00:00 DUE TO %s ***"


@pytest.mark.parametrize(("printed", "reason"), [
    ("srun: error: node0: task 0: Exited with exit code 1\nTraceback (most recent call last):\n  File \"x\"\n"
     "ModuleNotFoundError: No module named 'numpy'", "ModuleNotFoundError: No module named 'numpy'"),
    (f"Traceback (most recent call last):\n{PORT}", f"a port is taken: {PORT}"),
    ("usage: accelerate <command> [<args>]\nAccelerate CLI tool: error: unrecognized arguments: --nope",
     "Accelerate CLI tool: error: unrecognized arguments: --nope"),
    ("bash: line 3: accelerate: command not found", "bash: line 3: accelerate: command not found"),
    ("/usr/bin/python: No module named genscale", "/usr/bin/python: No module named genscale"),
    ("slurmstepd: error: execve(): python: No such file or directory\nsrun: error: node0: task 0: Exited with exit code 2",
     "slurmstepd: error: execve(): python: No such file or directory"),
    ("FATAL:   could not open image /x.sif: no such file", "FATAL: could not open image /x.sif: no such file"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.1.\nsrun: error: node0: task 0: Out Of Memory",
     "out of memory: slurmstepd: error: Detected 1 oom_kill event in StepId=7.1."),
    ("srun: error: node1: task 1: Killed", "srun: error: node1: task 1: Killed"),
    ("[rank1]: torch.distributed.DistStoreError: timed out\n[rank0]: RuntimeError: shapes", "[rank0]: RuntimeError: shapes"),
    ("srun: error: Node failure on node1\nsrun: error: node0: task 0: Killed", "Slurm: node failure on node1"),
    (CANCELLED % "TIME LIMIT", "Slurm: time limit"),
    (f"{CANCELLED % 'PREEMPTION'}\n{CANCELLED % 'JOB REQUEUE'}", "Slurm: preemption"),
    ("step 3: loss 2.1\n2026-01-01 WARNING no Error: here", None),
])  # fmt: skip
def test_what_a_log_says(printed, reason):
    assert reason_in(f"step 1: loss 3.2\n{printed}\nstep 2\n") == reason


@pytest.fixture
def log(run):
    """Where job 7 of the run prints to."""
    kept = new_folder(run)
    (kept / "config.yaml").write_text("train: {steps: 100}\n")
    (run / "logs").mkdir()
    file = run / "logs" / "slurm-7.log"
    record(run, Submitted("7", str(kept), str(file), (str(run),)))
    return file


@pytest.fixture
def say(log):
    def add(text):
        with log.open("a") as file:
            file.write(text)

    return add


def test_a_life_that_ends_in_its_launcher_says_why_and_where_to_read_on(genscale, run, log, say, in_job):
    for restart in range(3):
        in_job("7", restart)
        say(genscale("slurm", "begin", run).out)
        say(f"FileNotFoundError: launch/ddp.yaml of life {restart}\x1b[2J " + 999 * "x" + "\n")
        say(genscale("slurm", "end", run, "--code", 1).out)
        life = read_lives(run)[-1]
        assert life.how == "killed" and len(life.reason) <= 300
        assert f"launch/ddp.yaml of life {restart}\\x1b[2J xx" in life.reason
        assert life.reason in (run / "jobs" / "events.log").read_text().splitlines()[-1]
        if restart == 0:
            row = row_of(run, [Queued("7", "PENDING", "BeginTime", "", "1:00")])
            assert (row.state, row.note) == ("requeued", f"BeginTime; after killed: {life.reason}")
    note = row_of(run, []).note
    assert note.startswith("killed: FileNotFoundError: launch/ddp.yaml of life 2") and note.endswith(f"; see {log}")
    assert "; not requeued: 3 lives in a row have brought no new checkpoint" in note


@pytest.mark.parametrize(("code", "reason"), [
    (137, "ended by SIGKILL (out of memory?)"), (127, "exit code 127: a program of the script is not there"),
    (9, "exit code 9")])  # fmt: skip
def test_where_nothing_was_printed_the_exit_code_speaks(code, reason, genscale, run, say, in_job):
    in_job("7")
    say("RuntimeError: of an earlier job\n")
    say(genscale("slurm", "begin", run).out)
    assert genscale("slurm", "end", run, "--code", code).code == 75
    assert read_lives(run)[-1].reason == reason


def test_what_a_launcher_has_printed_of_its_process_is_the_reason(genscale, run, log, say, in_job):
    in_job("7")
    (run / "jobs").mkdir(parents=True, exist_ok=True)
    owner = RunOwner(run, print)
    say("ChildFailedError: \n  exitcode: -9\n  Signal 9 (SIGKILL) received by PID 31\n")
    assert genscale("slurm", "lost", run, "--code", 1).code == 0
    owner.release()
    reason = json.loads((run / "ended.json").read_text())["reason"]
    assert reason == f"a process on {host_name()} was lost (Signal 9 (SIGKILL) received by PID 31)"


@pytest.mark.parametrize(("printed", "code"), [
    ("error: checkpoint /r/step-00000007 could not be written: No space left on device; last good checkpoint: none", 75),
    ("error: train.steps: must be a whole number", 2)])
def test_a_full_disk_that_the_run_could_not_write_of_is_no_mistake(printed, code, genscale, run, say, in_job):
    in_job("7")
    say(genscale("slurm", "begin", run).out)
    say(f"{printed}\n")
    assert genscale("slurm", "end", run, "--code", 2).code == code


@pytest.mark.parametrize(("printed", "states", "reason"), [
    (CANCELLED % "PREEMPTION", "", "Slurm: preemption"), ("", "NODE_FAIL\nRUNNING", "node fail"),
    ("", "", "nobody has told its end: its node died, or Slurm has requeued it")])  # fmt: skip
def test_a_life_that_slurm_has_cut_off(printed, states, reason, genscale, run, say, in_job, tool):
    tool("sacct", f"printf '{states}'")
    in_job("7")
    say(genscale("slurm", "begin", run).out)
    say(f"{printed}\n")
    in_job("7", 1)
    assert genscale("slurm", "begin", run).code == 0
    assert (read_lives(run)[0].how, read_lives(run)[0].reason) == ("killed", reason)


def test_a_job_that_never_began_says_why(run, log, say, tool):
    tool("scontrol", "echo 'JobId=7 JobState=FAILED Reason=NonZeroExitCode'")
    say("error: job 7: site.setup: exit code 1 of `module load cuda`\n")
    assert row_of(run, []).note == f"failed: error: job 7: site.setup: exit code 1 of `module load cuda`; see {log}"


def test_a_job_whose_log_could_not_be_opened_has_slurms_word_alone(run, log, say, tool):
    tool("scontrol", "echo 'JobId=7 JobState=FAILED Reason=JobLaunchFailure Dependency=(null)'")
    say("an earlier life's word")
    assert row_of(run, []).note == f"failed: JobLaunchFailure; see {log}"


def test_each_life_has_a_port_of_its_own_that_is_free(genscale, run, in_job, monkeypatch):
    free = free_port(7, 0)
    monkeypatch.setattr(ports, "FIRST_PORT", free - 7)
    with socket.create_server(("", free)):
        in_job("7")
        assert genscale("slurm", "begin", run).code == 0
        first = int((run / "jobs" / "port").read_text())
    in_job("7", 1)
    assert genscale("slurm", "begin", run).code == 0
    second = int((run / "jobs" / "port").read_text())
    assert len({free, first, second}) == 3
    socket.create_server(("", second)).close()


def test_a_port_that_is_taken_all_the_same_is_one_line_and_costs_one_life(genscale, run, in_job, monkeypatch):
    """Between the look and the meeting."""
    from accelerate.state import PartialState

    in_job("7", GENSCALE_RUN=str(run))
    assert genscale("slurm", "begin", run).code == 0
    with socket.create_server(("", 0)) as other:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1]), "WORLD_SIZE": "2", "RANK": "0",
                 "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        before = dict(PartialState._shared_state)
        PartialState._reset_state()
        try:
            with pytest.raises(PortTaken, match=f"^MASTER_PORT: {place['MASTER_PORT']} is taken by another program on"), \
                    before_the_run():
                Processes()
        finally:
            PartialState._reset_state()
            PartialState._shared_state.update(before)
    assert json.loads((run / "ended.json").read_text())["how"] == "lost"
    assert genscale("slurm", "end", run, "--code", 1).code == 75
    assert "MASTER_PORT" in read_lives(run)[-1].reason
