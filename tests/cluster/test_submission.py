"""What a user types before and after a job, on a real Slurm: what is refused, shown and cancelled. No job here ever begins."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def slurm(cluster, jobs, genscale):
    """`genscale slurm` in the cluster."""

    def run(*words):
        with jobs.variables_set({"SLURM_CONF": cluster.environment["SLURM_CONF"]}):
            return genscale("slurm", *words)

    return run


@pytest.fixture
def site(cluster, tmp_path):
    """The cluster's, whose jobs are held."""
    path = tmp_path / "site.yaml"
    path.write_text((cluster.folder / "site.yaml").read_text() + "sbatch: [--hold]\n")
    return path


@pytest.mark.parametrize(("flags", "overrides", "message"), [
    (("--partition", "gpu"), (), "--partition: refused by Slurm: .*nvalid partition.* (it has main, urgent)"),
    (("--gpus-per-node", "3"), (), "--gpus-per-node: 3 GPUs on a node, and no node of partition main has more than 2"),
    (("--nodes", "4"), (), "--nodes: 4 is more than the 3 nodes of partition main"),
    (("--time", "1:60:00:00"), (), "--time: '1:60:00:00' is not a time limit"),
    ((), ("--train.global_batch_size", "7", "--train.micro_batch_size", "2"), "train.micro_batch_size: 2 x 1 processes"),
])  # fmt: skip
def test_what_is_refused_is_not_submitted(flags, overrides, message, slurm, cluster, site, new_run):
    run = new_run()
    before = cluster.slurm("squeue", "--noheader", "--format=%A")
    said = slurm("submit", "--config", run.config, "--site", site, *flags, "--", *overrides).err.splitlines()[-1]
    for part in message.split(".*"):
        assert part in said, said
    assert cluster.slurm("squeue", "--noheader", "--format=%A") == before
    assert not run.folder.exists()


def test_a_dry_run_shows_the_script_and_when_it_would_start(slurm, cluster, site, new_run):
    run = new_run()
    before = cluster.slurm("squeue", "--noheader", "--format=%A")
    shown = slurm("submit", "--config", run.config, "--site", site, "--nodes", 2, "--dry-run").out
    assert shown.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in shown
    assert "to start at" in shown.splitlines()[-1] and "node" in shown.splitlines()[-1]
    assert cluster.slurm("squeue", "--noheader", "--format=%A") == before and not run.folder.exists()


def test_a_job_that_waits_is_shown_and_not_submitted_twice_and_cancelled(slurm, cluster, site, new_run):
    run = new_run()
    job = cluster.submit(run, "--site", str(site))
    script = run.folder / "jobs" / "0001" / "job.sbatch"
    assert f"\nconfig={script.parent}/config.yaml\n" in script.read_text()
    assert f"StdOut={run.folder}/logs/slurm-{job.id}.log" in cluster.slurm("scontrol", "-o", "show", "job", job.id)
    row = slurm("status", run.folder).out.splitlines()[1]
    assert row.split()[:4] == [str(run.folder), job.id, "queued", "0"]
    assert row.endswith(f"  JobHeldUser; once you know why: genscale slurm release {run.folder}")
    again = slurm("submit", "--config", run.config, "--site", site).message()
    assert f"{run.folder} has a job already: {job.id} (pending)" in again
    assert slurm("cancel", run.folder).out == f"cancelled job {job.id} (pending)\n"
    assert job.state == "CANCELLED"
    assert "no job of" in slurm("cancel", run.folder).message()
    assert slurm("status", run.folder).out.splitlines()[1].split()[2] == "ended"


def test_a_job_is_submitted_again_held_and_released(slurm, cluster, jobs, site, new_run):
    run, comment = new_run(), "it's #1: a \"run\""
    first = cluster.submit(run, "--site", str(site), "--begin", "now+1hour", "--comment", comment, "--sbatch=--nice=7")
    assert "has a job already" in slurm("resubmit", run.folder).message()
    slurm("cancel", run.folder)
    again = slurm("resubmit", run.folder)
    job = jobs.Job(cluster, again.out.partition("submitted job ")[2].partition(":")[0])
    assert job.id != first.id, again.err
    assert f"Comment={comment} " in cluster.slurm("scontrol", "-o", "show", "job", job.id)
    assert (job.details()["Nice"], job.details()["Reason"]) == ("7", "JobHeldUser")
    assert slurm("release", run.folder).out == f"released job {job.id} (pending)\n"
    assert job.details()["Reason"] in ("None", "BeginTime")
    assert slurm("hold", run.folder).out == f"held job {job.id}\n"
    assert job.details()["Reason"] in ("JobHeldUser", "JobHeldAdmin")  # root's is
    assert slurm("cancel", run.folder).out == f"cancelled job {job.id} (pending)\n"
