"""Two nodes train what one process trains."""

from __future__ import annotations

import pytest


def test_ddp_on_two_nodes_is_the_single_process_run(undisturbed, alone, campaign):
    campaign.check_alike(undisturbed, alone)


@pytest.mark.parametrize(("strategy", "gpus", "launcher"), [
    ("zero2", 2, "srun"), ("fsdp2", 1, "accelerate"),
    *(pytest.param(*cell, marks=[pytest.mark.slow, pytest.mark.matrix]) for cell in [
        ("ddp", 2, "srun"), ("ddp", 2, "accelerate"), ("zero2", 1, "accelerate"), ("fsdp2", 2, "srun")])])  # fmt: skip
def test_strategies_on_two_nodes_are_the_single_process_run(strategy, gpus, launcher, cluster, new_run, alone, campaign):
    """One and two processes a node, each with a GPU of its own as far as Slurm knows. There are none, and the job says that it
    computes on the CPU."""
    run = new_run(**{"parallel.strategy": strategy})
    job = cluster.submit(run, "--nodes", "2", "--gpus-per-node", str(gpus), "--launcher", launcher, "--time", "10",
                         ACCELERATE_USE_CPU="true")
    job.end()
    campaign.check_alike(run, alone)
    heads = {(about["world_size"], about["strategy"]) for about in [run.latest().manifest()["about"]]}
    assert heads == {(2 * gpus, strategy)}
