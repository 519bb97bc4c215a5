"""Lives of a job: which of them goes on, and which ends it. On run folders as runs leave them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading

import pytest

from genscale.cluster import job_life
from genscale.cluster.lives import read_lives
from genscale.supervise.run_owner import RunOwner

GO_ON, COMPLETE, UNFIT, NO_ROOM, AGAIN = 0, 10, 11, 12, 75


@pytest.fixture
def life(genscale, run, in_job):
    """A life: begins, does `meanwhile`, and ends with the exit code; its exit codes at both ends."""

    def live(restart, meanwhile=None, code=1, job="7", max_requeues=100):
        in_job(job, restart)
        begun = genscale("slurm", "begin", run, "--max-requeues", max_requeues)
        if begun.code:
            return begun.code, None
        if meanwhile:
            meanwhile()
        return begun.code, genscale("slurm", "end", run, "--code", code, "--max-requeues", max_requeues).code

    return live


def events(run):
    return (run / "jobs" / "events.log").read_text().splitlines()


def test_a_run_that_was_stopped_goes_on_until_it_is_complete_and_then_no_more(life, run, say_ended, checkpoint_at):
    def stopped():
        checkpoint_at(4)
        say_ended("stopped", 138, 4, signal="SIGUSR1")

    def complete():
        assert not (run / "ended.json").exists()  # what the first life said is not taken for the second's word
        checkpoint_at(8)
        say_ended("complete", 0, 8)

    assert life(0, stopped) == (GO_ON, AGAIN)
    assert life(1, complete, code=0) == (GO_ON, 0)
    assert life(2) == (COMPLETE, None)  # Slurm had requeued it over its head
    first, second = read_lives(run)
    assert (first.job, first.restart, first.nodes, first.step, first.end_step, first.how, first.code) == \
        ("7", 0, ("node0",), 0, 4, "stopped", 138)
    assert (second.restart, second.step, second.end_step, second.how) == (1, 4, 8, "complete")
    assert "life 1 ended after step 4: stopped (SIGUSR1); the job is requeued" in events(run)[1]
    assert "life 2 ended after step 8: complete; the run is complete" in events(run)[3]


def test_another_job_may_train_a_complete_run_on(life, say_ended, checkpoint_at):
    def complete():
        checkpoint_at(8)
        say_ended("complete", 0, 8)

    assert life(0, complete, job="7") == (GO_ON, 0)
    assert life(0, job="8")[0] == GO_ON


@pytest.mark.parametrize(("how", "code", "goes_on"), [
    ("stopped", 138, True), ("hang", 75, True), ("lost", 2, True), ("failed", 1, True), (None, 137, True), (None, 1, True),
    ("failed", 2, False), (None, 2, False), (None, 0, False), ("complete", 0, False),
])  # fmt: skip
def test_which_ends_are_followed_by_another_life(how, code, goes_on, life, say_ended, checkpoint_at):
    """A mistake of the user's would only come again; a crash may have been the machine's."""

    def end():
        checkpoint_at(2)
        if how:
            say_ended(how, code, 2)

    begun, ended = life(0, end, code)
    assert begun == GO_ON
    assert ended == (AGAIN if goes_on else code)


def test_a_stop_that_could_not_be_written_down_is_not_taken_for_the_end_of_the_run(life, run, checkpoint_at):
    """Of a launcher comes 0 after a stop, too."""
    def end(step):
        (run / "config.yaml").write_text("train: {steps: 8}\n")
        checkpoint_at(step)

    assert life(0, lambda: end(6), 0) == (GO_ON, AGAIN)
    assert read_lives(run)[0].how == "stopped" and read_lives(run)[0].reason
    assert life(1, lambda: end(8), 0) == (GO_ON, 0)
    assert read_lives(run)[1].how == "complete"


def test_a_stop_that_nobody_could_tell_keeps_its_signal(genscale, run, in_job, say_ended):
    in_job("7")
    assert genscale("slurm", "begin", run).code == GO_ON
    say_ended("stopped", 138, 2, signal="SIGUSR1")
    in_job("7", 1)
    assert genscale("slurm", "begin", run).code == GO_ON
    assert (read_lives(run)[0].how, read_lives(run)[0].reason) == ("stopped", "SIGUSR1")


def test_exit_codes_that_a_launcher_has_changed_are_read_from_the_run_folder(life, say_ended):
    assert life(0, lambda: say_ended("failed", 2, reason="train.steps: wrong"), code=1) == (GO_ON, 2)


def test_three_lives_without_a_new_checkpoint_end_the_job(life, run, checkpoint_at):
    checkpoint_at(6)
    assert [life(restart) for restart in range(3)] == [(GO_ON, AGAIN), (GO_ON, AGAIN), (GO_ON, 1)]
    assert "3 lives in a row have brought no new checkpoint (the latest is of step 6)" in events(run)[-1]


def test_lives_that_bring_the_run_on_do_not_count_as_fruitless(life, checkpoint_at):
    for restart in range(8):
        crash = (lambda step=restart: checkpoint_at(step)) if restart % 3 == 2 else None
        assert life(restart, crash) == (GO_ON, AGAIN), restart


def test_lives_that_ended_with_their_node_count_too(genscale, life, run, in_job):
    """Slurm requeues a job whose node has died, and nobody says how that life ended."""
    for restart in range(3):
        in_job("7", restart)
        assert genscale("slurm", "begin", run).code == GO_ON
    in_job("7", 3)
    refused = genscale("slurm", "begin", run)
    assert refused.code == 2 and "3 lives in a row have brought no new checkpoint" in refused.err
    assert genscale("slurm", "end", run, "--code", 2).code == 2
    assert [each.how for each in read_lives(run)] == ["killed", "killed", None]


def test_a_cap_on_requeues(life, run, checkpoint_at):
    lives = [life(restart, lambda step=restart + 1: checkpoint_at(step), max_requeues=2) for restart in range(3)]
    assert lives == [(GO_ON, AGAIN), (GO_ON, AGAIN), (GO_ON, 1)]
    assert "the job has had 3 lives (--max-requeues 2)" in events(run)[-1]


def test_a_life_that_was_ended_before_it_was_counted_counts(genscale, run, in_job):
    run.mkdir(parents=True)
    (run / "jobs").mkdir()
    codes = []
    for restart in range(3):
        in_job("7", restart)
        codes.append(genscale("slurm", "end", run, "--code", 138).code)
    assert codes == [AGAIN, AGAIN, 138]


def test_an_old_life_does_not_requeue_the_job_over_the_head_of_a_later_one(genscale, run, in_job):
    in_job("7", 0)
    assert genscale("slurm", "begin", run).code == GO_ON
    in_job("7", 1)
    assert genscale("slurm", "begin", run).code == GO_ON
    in_job("7", 0)  # its node was cut off from the controller, and is back
    late = genscale("slurm", "end", run, "--code", 1)
    assert late.code == 1 and "a later one has the run" in late.out
    assert read_lives(run)[-1].how is None


def test_a_run_that_goes_on_elsewhere_is_refused_with_its_job(genscale, run, in_job, monkeypatch):
    run.mkdir(parents=True)
    script = ("import sys, pathlib, time; from genscale.supervise.run_owner import RunOwner; "
              "RunOwner(pathlib.Path(sys.argv[1]), print); print('mine', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", script, str(run)], env={**os.environ, "SLURM_JOB_ID": "41"},
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        in_job("42")
        message = genscale("slurm", "begin", run).message()
        assert "belongs to a run that goes on" in message and "Slurm job 41" in message
        assert genscale("slurm", "end", run, "--code", 2).code == 2
        assert read_lives(run) == []
    finally:
        other.kill()
        other.wait(10)


def test_the_beginning_leaves_the_folder_to_the_training(genscale, run, in_job):
    in_job("7")
    assert genscale("slurm", "begin", run).code == GO_ON
    owner = RunOwner(run, print)  # in a job it is another process, maybe on another machine
    owner.release()


def test_a_bad_node_is_named_and_not_to_be_given_again(genscale, run, in_job, monkeypatch):
    """Two nodes: on one of them a file server does not answer, say; here, it lacks a package."""
    in_job("7", GENSCALE_NODES="node0 node1", SLURMD_NODENAME="node1", SLURM_PROCID="1")
    path = os.pathsep.join(sys.path)
    bad = subprocess.run([sys.executable, "-S", "-m", "genscale", "slurm", "begin", str(run)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{path}"}, timeout=120)
    assert bad.returncode == 0, bad.stderr
    report = run / "jobs" / "nodes" / "node1.json"
    said = json.loads(report.read_text())
    report.write_text(json.dumps({**said, "failures": ["open files: too few"], "at_fault": True}))
    monkeypatch.setenv("SLURMD_NODENAME", "node0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    begun = genscale("slurm", "begin", run)
    assert begun.code == UNFIT and "node1 is not fit: open files: too few" in begun.out
    ended = genscale("slurm", "end", run, "--code", UNFIT)
    assert ended.code == AGAIN and "node1 is left out of the next life" in ended.out
    assert (run / "jobs" / "exclude").read_text() == "node1"
    assert (read_lives(run)[-1].how, read_lives(run)[-1].reason) == ("unfit", "node1: open files: too few")


def test_nodes_are_held_against_each_other(genscale, run, in_job, monkeypatch, tmp_path):
    """node1 has another version of a package, and a clock that is 100 s ahead."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 100\n")
    package = tmp_path / "site" / "wandb-0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n")
    in_job("7", GENSCALE_NODES="node0 node1", SLURMD_NODENAME="node1", SLURM_PROCID="1")
    path = os.pathsep.join([str(tmp_path / "site"), os.getcwd()])
    other = subprocess.run([sys.executable, "-m", "genscale", "slurm", "begin", str(run)], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert other.returncode == 0, other.stderr
    monkeypatch.setenv("SLURMD_NODENAME", "node0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    begun = genscale("slurm", "begin", run)
    assert begun.code == UNFIT and "wandb 0.1: not those of the other nodes" in begun.out
    assert "clocks: node1 is 100.0 s ahead of node0" in begun.out
    assert genscale("slurm", "end", run, "--code", UNFIT).code == AGAIN
    assert (run / "jobs" / "exclude").read_text() == "node1"
    assert not list(run.glob("**/.clock-*"))


def test_a_node_is_held_against_the_loader_workers_of_the_run(genscale, run, in_job):
    in_job("7")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))  # too few for 80 loader workers, enough for none
    try:
        assert genscale("slurm", "begin", run).code == GO_ON
        begun = genscale("slurm", "begin", run, "--workers", 80)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert begun.code == UNFIT and "node0 is not fit: open files: 600 may be open" in begun.out, begun.out + begun.err
    assert "for 1 process and 80 loader workers" in begun.out


def test_a_node_that_says_nothing_is_named(genscale, run, in_job, monkeypatch):
    from genscale.cluster import job_life

    monkeypatch.setattr(job_life, "NODES_SECONDS", 0.5)
    in_job("7", GENSCALE_NODES="node0 node1")
    begun = genscale("slurm", "begin", run)
    assert begun.code == UNFIT and "node1 has not reported" in begun.out
    assert genscale("slurm", "end", run, "--code", UNFIT).code == AGAIN
    assert (run / "jobs" / "exclude").read_text() == "node1"


def test_elements_of_an_array_are_called_as_slurm_takes_them(genscale, run, in_job):
    in_job("12", array="10_2")
    assert genscale("slurm", "begin", run).code == GO_ON
    assert read_lives(run)[-1].job == "10_2"


def test_outside_of_a_job_it_says_so(genscale, run):
    assert "SLURM_JOB_ID is not set" in genscale("slurm", "begin", run).message()


@pytest.mark.parametrize(("checkpoint", "code", "words"), [
    (0, NO_ROOM, "not requeued: there is no checkpoint yet that could be lost"), (4, AGAIN, "the job is requeued"),
])  # fmt: skip
def test_a_full_disk_at_the_beginning_ends_no_job_that_has_a_checkpoint(checkpoint, code, words, genscale, in_job, small_disk,
                                                                        monkeypatch):
    monkeypatch.setattr(job_life, "ROOM_SECONDS", (0.01,))
    monkeypatch.setattr(job_life, "RETRY_SECONDS", (0.01,))
    full = small_disk("2m")
    if checkpoint:
        (full / "run" / "checkpoints" / f"step-{checkpoint:08d}").mkdir(parents=True)
    for restart in range(5 if checkpoint else 1):  # as long as it takes, unlike lives that train in vain
        in_job("7", restart)
        begun = genscale("slurm", "begin", full / "run")
        assert begun.code == NO_ROOM and "cannot be written" in begun.out and "tries again in" in begun.out, begun.out
        ended = genscale("slurm", "end", full / "run", "--code", NO_ROOM, "--max-requeues", 4)
        if restart < 4:
            assert ended.code == code and words in ended.out, ended.out + ended.err
    assert not (full / "run" / "jobs" / "exclude").exists()
    assert ended.code == NO_ROOM and (not checkpoint or "the job has had 5 lives (--max-requeues 4)" in ended.out)


def test_a_disk_that_is_full_for_a_moment_costs_a_moment(genscale, run, in_job, monkeypatch):
    monkeypatch.setattr(job_life, "ROOM_SECONDS", (1.0,))
    in_job("7")
    (run / "jobs").mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = threading.Timer(0.8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # every write fails
    room.start()
    try:
        begun = genscale("slurm", "begin", run)
    finally:
        room.join()
    assert begun.code == GO_ON and begun.out.count("tries again in 1 s") == 1, begun.out + begun.err
    assert len(read_lives(run)) == 1


def test_a_run_folder_that_cannot_be_written_is_one_line(genscale, tmp_path, in_job):
    (tmp_path / "file").write_text("")
    in_job("7")
    for words in (("begin",), ("end", "--code", 1)):
        message = genscale("slurm", words[0], tmp_path / "file" / "run", *words[1:]).message()
        assert message.startswith(f"run.dir: cannot write to {tmp_path}/file/run (Not a directory)")


def test_a_full_disk_at_the_end_of_a_life_does_not_end_the_job(genscale, run, in_job, checkpoint_at, monkeypatch):
    monkeypatch.setattr(job_life, "RETRY_SECONDS", (0.01, 0.01))
    in_job("7", 0)
    assert genscale("slurm", "begin", run).code == GO_ON
    checkpoint_at(4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # every write fails
    try:
        ended = genscale("slurm", "end", run, "--code", 143)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.code == AGAIN and ended.out.count("the end of this life cannot be written") == 3, ended.out + ended.err
    in_job("7", 1)
    assert genscale("slurm", "begin", run).code == GO_ON
    first = read_lives(run)[0]
    assert (first.how, first.end_step, first.goes_on) == ("killed", 4, True)
