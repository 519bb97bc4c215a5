"""A job that has to give its nodes back writes one checkpoint, is requeued, and ends as the run that was never stopped."""

from __future__ import annotations

BOTH = {"0", "1"}


def stop_in_step_10(run, job, act, name: str) -> None:
    """Do something to the job in the middle of step 10; the run goes on once both ranks have got the signal."""
    job.wait_for(lambda: run.left("hold") == BOTH, "both ranks are in step 10")
    act()
    job.wait_for(lambda: run.left(name) == BOTH, f"both ranks have got {name}")
    run.let_go()
    job.wait_for(lambda: run.steps_saved() == [9, 10], "a checkpoint of step 10, and none between it and that of step 9")


def test_usr1_by_hand(cluster, undisturbed, new_run, campaign):
    run = new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "accelerate", planted="hold@10/0")
    stop_in_step_10(run, job, lambda: job.signal("USR1"), "SIGUSR1")
    assert job.end()["Restarts"] == "1"
    campaign.check_same(run, undisturbed)


def test_usr1_by_a_time_limit_of_a_minute(cluster, undisturbed, new_run, campaign):
    """Slurm looks at time limits twice a minute: the signal comes up to 30 s early. A start that takes longer than that has
    nothing to save, and the next life meets the signal."""
    run = new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "srun", "--time", "1", "--lead", "5", planted="await-signal@10")
    job.wait_for(lambda: run.steps_saved() == [9, 10], "a checkpoint of step 10", 200)
    life = job.restarts
    assert run.left("SIGUSR1", life) == BOTH
    assert int(job.end()["Restarts"]) == life + 1
    campaign.check_same(run, undisturbed)


def test_preemption(cluster, undisturbed, new_run, campaign):
    """Of every node by a job of the partition `urgent`, which comes with SIGTERM."""
    run = new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "accelerate", planted="hold@10/0")

    def preempt() -> None:
        cluster.slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    stop_in_step_10(run, job, preempt, "SIGTERM")
    assert job.end()["Restarts"] == "1"
    campaign.check_same(run, undisturbed)


def test_a_signal_after_the_last_step_does_not_requeue_the_finished_run(cluster, undisturbed, new_run, campaign):
    run = new_run()
    job = cluster.submit(run, "--nodes", "2", "--launcher", "accelerate", planted="hold-end@24")
    job.wait_for(lambda: run.left("hold-end") == BOTH, "both ranks are done")
    job.signal("USR1")
    job.wait_for(lambda: run.left("SIGUSR1") == BOTH, "both ranks have got the signal")
    run.let_go()
    assert job.end()["Restarts"] == "0"
    assert run.document("ended.json")["how"] == "complete"
    campaign.check_same(run, undisturbed)
