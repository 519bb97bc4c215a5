"""Nodes, networks and the controller go, or were never fit, and the run goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import accelerate
import pytest

from genscale.checkpoint.checkpoints import list_checkpoints

BOTH = {"0", "1"}


@pytest.fixture
def whole(cluster):
    """Whatever a test has broken is mended after it."""
    yield cluster
    cluster.mend()


def test_power_cuts_in_a_step_and_in_a_save(whole, undisturbed, new_run, campaign):
    """Each time of the node of rank 0, from where Slurm controls the job; a spare node takes its place."""
    cluster, run = whole, new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "srun", planted="hold@10/0,hold-save@15/1")
    job.wait_for(lambda: run.left("hold") == BOTH, "both ranks are in step 10")
    first = job.details()["BatchHost"]
    cluster.do("cut-power", first)
    job.wait_for(lambda: run.left("hold-save", 1) == {"0"}, "the next life saves step 15")
    assert run.steps_saved() == [9, 12]
    details = job.details()
    assert details["NodeList"] == "node[1-2]" and first == "node0"
    cluster.do("start-node", first)
    cluster.do("cut-power", details["BatchHost"])
    assert [name for name, _ in run.unfinished() if "step-00000015" in name]
    details = job.end(seconds=180)
    assert details["Restarts"] == "2" and details["BatchHost"] != "node1"
    campaign.check_same(run, undisturbed)


def test_a_split_network(whole, undisturbed, new_run, campaign):
    """The node is out of Slurm's sight, not of the shared disk's: the old life of the job goes on in the middle of a step while
    the new one takes over; then it writes nothing any more, ends by itself, and says why."""
    cluster, run = whole, new_run()
    job = cluster.submit(run, "--tasks-per-node", "2", "--launcher", "accelerate", planted="hold@11/0,hold@20/1")
    job.wait_for(lambda: run.left("hold") == BOTH and len(run.processes()) == 2, "both ranks are in step 11")
    node = job.details()["BatchHost"]
    old = run.processes()
    cluster.do("split", node)
    job.wait_for(lambda: job.restarts == 1 and run.owner()["restart"] == "1", "the next life owns the run folder")
    run.let_go(0)  # to step 12 and its checkpoint
    job.wait_for(lambda: "was taken over by process" in job.output(), "the old life says why it ends")
    job.wait_for(lambda: run.left("hold", 1) == BOTH, "the new life trains")
    assert not [pid for _, pid in old if cluster.lives(node, pid)]
    run.let_go(1)
    details = job.end()
    assert details["Restarts"] == "1" and details["BatchHost"] != node
    writers = {checkpoint.manifest()["about"]["host"] for checkpoint in list_checkpoints(run.checkpoints)}
    assert writers == {details["BatchHost"]}
    campaign.check_same(run, undisturbed)


def test_a_node_that_is_not_fit_is_named_and_left_out(cluster, new_run):
    """Of one package that all nodes have the first one has none."""
    (package,) = Path(accelerate.__file__).parents[1].glob("accelerate-*.dist-info")
    run = new_run(**{"train.steps": 6})
    cluster.do("exec", "node0", "mount", "-t", "tmpfs", "none", str(package))
    try:
        job = cluster.submit(run, "--launcher", "srun")
        details = job.end()
    finally:
        cluster.do("exec", "node0", "umount", str(package))
    lives = run.document("jobs/lives.json")["lives"]
    assert [life["nodes"] for life in lives] == [["node0"], [details["BatchHost"]]] and details["BatchHost"] != "node0"
    assert "node0 is not fit: versions: " in job.output() and "not installed: accelerate" in job.output()
    assert [life["how"] for life in lives] == ["unfit", "complete"] and run.step() == 6


def test_a_controller_that_is_away_while_the_job_wants_to_be_requeued(whole, undisturbed, new_run, campaign):
    """It goes when it knows that the processes have ended: who is to tell it in vain tries again after a minute, and Slurm may
    then wait for minutes more until it starts the job again."""
    cluster, run = whole, new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "srun", planted="await-signal@10/0,hold-requeue@0/0")
    job.wait_for(lambda: run.step() == 9 and len(run.processes()) == 2, "both ranks are in step 10")
    for host, pid in run.processes():
        cluster.do("exec", host, "kill", "-USR1", str(pid))
    job.wait_for(lambda: run.left("hold-requeue") and job.steps() == {"batch"}, "the processes have ended")
    assert run.document("ended.json")["how"] == "stopped"
    cluster.do("kill-controller")
    run.let_go()
    time.sleep(8)  # in which the job asks for its requeue in vain
    cluster.do("start-controller")
    assert job.end()["Restarts"] == "1"
    campaign.check_same(run, undisturbed)


def test_what_is_killed_on_one_node_is_told_on_the_other(cluster, undisturbed, new_run, campaign):
    """A process, while the other one is in no collective that would break; then a launcher, whose process saves and ends.
    Nobody waits for what is gone, as `srun --wait` would for a minute."""
    run = new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "accelerate", planted="hold@10/0,hold@14/1")
    seconds = []
    for life, signalled in enumerate((False, True)):
        job.wait_for(lambda life=life: run.left("hold", life) == BOTH and len(run.processes()) == 2, "both ranks are in a step")
        node, pid = next((host, pid) for host, pid in run.processes() if host != job.details()["BatchHost"])
        if signalled:
            pid = int(cluster.do("exec", node, "ps", "-o", "ppid=", "-p", str(pid)))
        cluster.do("exec", node, "kill", "-KILL", str(pid))
        struck = time.monotonic()
        if signalled:
            job.wait_for(lambda: run.left("SIGTERM", 1) == {"1"}, "the launcher's process is told to stop")
            run.let_go(1)
        job.wait_for(lambda life=life: f"life {life + 1} ended " in job.output(), "the life ends")
        seconds.append(time.monotonic() - struck)
    job.end()
    first, second, _ = run.document("jobs/lives.json")["lives"]
    assert first["how"] == "lost"
    assert re.fullmatch(r"a process on node1 was lost \(Signal 9 \(SIGKILL\) received by PID \d+\)", first["reason"]), first
    assert (second["how"], second["end_step"]) == ("stopped", 14)
    assert max(seconds) < 40, seconds
    campaign.check_same(run, undisturbed)
