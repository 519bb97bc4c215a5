"""Which jobs are requeued, and which are not. All of them are submitted at once: they are of one process, and wait a lot."""

from __future__ import annotations

import os
import shutil

import pytest

from genscale.checkpoint.code_version import ROOT
from genscale.cluster import snapshot


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of genscale, which changes between the lives of a job."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "genscale", folder / "genscale")
    return folder


@pytest.fixture(scope="module")
def submitted(cluster, jobs, source, clone, tmp_path_factory):
    """Run and job by what is planted in them. The array is submitted from the clone."""
    found: dict[str, tuple] = {}
    foreign = {"PYTHONPATH": os.pathsep.join([str(jobs.HERE / "planted"), str(clone)])}
    for name, planted, *flags in (("array", "hold@4/0", "--array", "seed=0-2"), ("die", "die@2"), ("mistake", "mistake@2")):
        run = jobs.JobRun(tmp_path_factory.mktemp(name), source, **{"train.steps": 6})
        with pytest.MonkeyPatch.context() as patch:
            if name == "array":
                patch.setattr(snapshot, "ROOT", clone)
            found[name] = run, cluster.submit(run, "--launcher", "srun", *flags, planted=planted, **foreign)
        # The others are submitted from inside an element of the array, in its third life, by someone with habits of their own.
        foreign = {"SLURM_ARRAY_JOB_ID": found["array"][1].id, "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "1",
                   "SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "400",
                   "SLURM_TIME_FORMAT": "relative", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1",
                   "SBATCH_OPEN_MODE": "truncate", "SQUEUE_STATES": "COMPLETED", "GENSCALE_STOP_AT": "1"}
    return found


def test_an_element_of_an_array_is_requeued_alone(cluster, jobs, submitted, clone):
    """The last one, whose job id is that of the whole array. The others, which end by themselves, are not started again.
    It goes on with the code that it was submitted with, though there is another by now."""
    run, array = submitted["array"]
    elements = [jobs.Job(cluster, f"{array.id}_{number}") for number in range(3)]
    members = [run.element(number) for number in range(3)]
    for member, element in zip(members, elements, strict=True):
        element.wait_for(lambda member=member: member.left("hold") == {"0"}, "it is in step 4")
    for number in (0, 1):
        members[number].let_go()
        elements[number].end()
    (clone / "genscale" / "cli.py").write_text("raise SystemExit('the code has changed')\n")
    elements[2].signal("USR1")
    elements[2].wait_for(lambda: members[2].left("SIGUSR1") == {"0"}, "it has got the signal")
    members[2].let_go()
    elements[2].end()
    assert [element.details()["Restarts"] for element in elements] == ["0", "0", "1"]
    assert [element.state for element in elements] == 3 * ["COMPLETED"]
    assert [member.step() for member in members] == [6, 6, 6]
    assert len({member.latest().digest() for member in members}) == 3
    (copy,) = (run.folder / "jobs").glob("code-*")
    lives = [life for member in members for life in member.document("jobs/lives.json")["lives"]]
    assert [life["snapshot"] for life in lives] == 4 * [copy.name.removeprefix("code-")]


def test_a_run_that_dies_in_the_same_step_each_time_stops_after_three_lives(submitted):
    run, job = submitted["die"]
    assert job.end("FAILED", 180)["Restarts"] == "2"
    assert "not requeued: 3 lives in a row have brought no new checkpoint" in job.output().splitlines()[-1]
    assert job.details()["TimeLimit"] == "00:10:00"
    assert [life["job"] for life in run.document("jobs/lives.json")["lives"]] == 3 * [job.id]


def test_a_mistake_is_not_requeued(submitted):
    _, job = submitted["mistake"]
    details = job.end("FAILED")
    assert details["Restarts"] == "0" and details["ExitCode"] == "2:0"
    output = job.output().splitlines()
    assert [line for line in output if line.startswith("error: ")] == ["error: data.source: a planted mistake"]
    assert "not requeued" in output[-1]
