"""A job that cannot go on says why, and what the next life would not meet does not end it. All are submitted at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from genscale.cluster.ports import free_port

LISTEN = "import socket, sys; other = socket.create_server(('', int(sys.argv[1]))); print('on', flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def submitted(cluster, jobs, source, tmp_path_factory):
    """Run and job by what is wrong: GPUs that are none, a torch that cannot be loaded, a port that another program has."""
    broken = tmp_path_factory.mktemp("site") / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    (broken / "version.py").write_text("__version__ = '2.13.0'\ncuda = '12.8'\n")
    path = {"PYTHONPATH": os.pathsep.join([str(broken.parent), str(jobs.ROOT)])}
    found = {}
    for name, flags, variables in (("port", ("--nodelist", "node0", "--sbatch=--hold"), {}),
                                   ("gpus", ("--gpus-per-node", "2", "--max-requeues", "1"), {}),
                                   ("torch", ("--max-requeues", "0"), path)):
        run = jobs.JobRun(tmp_path_factory.mktemp(name), source, **{"train.steps": 6})
        found[name] = run, cluster.submit(run, "--launcher", "srun", *flags, **variables)
    return found


def test_a_port_that_is_taken_on_the_first_node_costs_nothing(cluster, jobs, submitted):
    run, job = submitted["port"]
    taken = free_port(int(job.id), 0)  # there, unless another program of this machine has it
    other = subprocess.Popen([jobs.SCRIPT, "exec", "node0", sys.executable, "-c", LISTEN, str(taken)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env=cluster.environment, text=True)
    try:
        assert other.stdout.readline() == "on\n"
        cluster.slurm("scontrol", "release", job.id)
        assert job.end()["Restarts"] == "0"
    finally:
        other.communicate(timeout=10)  # it ends with its input
    assert run.step() == 6 and int((run.folder / "jobs" / "port").read_text()) != taken


def test_gpus_that_are_none_end_a_job_before_it_trains(submitted):
    """Each node is left out that is alone to blame; a torch for the CPU is the same on all of them."""
    run, job = submitted["gpus"]
    job.end("FAILED")
    lives = run.document("jobs/lives.json")["lives"]
    assert {life["how"] for life in lives} == {"unfit"} and not (run.folder / "metrics.jsonl").exists()
    assert all("promised GPUs: Slurm gave 2 GPUs, and " in life["reason"] for life in lives)
    assert len({*lives[0]["nodes"], *lives[-1]["nodes"]}) == len(lives)


def test_a_life_that_ends_before_its_first_step_says_why(cluster, submitted, genscale, monkeypatch):
    run, job = submitted["torch"]
    job.end("FAILED")
    (life,) = run.document("jobs/lives.json")["lives"]
    why = "ImportError: libcudart.so.12: cannot open shared object file"
    assert (life["how"], life["reason"]) == ("killed", why)
    assert f"killed ({why}); not requeued: the job has had 1 lives" in (run.folder / "jobs" / "events.log").read_text()
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert f"killed: {why}; not requeued" in genscale("slurm", "status", run.folder).out
