"""A task that `srun` has started by itself, as the process of a group that it is."""

from __future__ import annotations

import os

from genscale.cluster.job_nodes import job_hosts

FIRST_PORT, PORTS = 40_000, 20_000
"""Apart from the ports of training, which goes on in the same job perhaps."""


def adopt_slurm_task() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and where to meet from srun's variables, where it started several tasks and no launcher
    has set them. Raises UserError where Slurm does not name the nodes."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it; a batch script has the job's variables
    if "RANK" in os.environ or tasks == "1":
        return
    place = int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": tasks, "LOCAL_RANK": os.environ["SLURM_LOCALID"],
                   "LOCAL_WORLD_SIZE": _tasks_here(), "MASTER_ADDR": job_hosts()[0],
                   "MASTER_PORT": str(FIRST_PORT + place % PORTS)}


def _tasks_here() -> str:
    """From "2(x3),1": two tasks on each of three nodes, then one."""
    counts: list[str] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]
