"""A task that `srun` has started by itself, as the process of a group that it is."""

from __future__ import annotations

import os

FIRST_PORT, PORTS = 10_000, 10_000
"""Apart from the ports of training, which goes on in the same job perhaps, and below those that systems give to whoever asks
for any. Each step and each life of a job has another one."""


def is_slurm_task() -> bool:
    """Whether srun has started several tasks, of which this is one, and no launcher has said so yet."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it; a batch script has the job's variables
    return "RANK" not in os.environ and tasks != "1"


def adopt_slurm_task() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and where to meet from srun's variables, where it started several tasks and no launcher
    has set them. Raises UserError where Slurm does not name the nodes."""
    if not is_slurm_task():
        return
    from genscale.cluster.job_nodes import job_hosts  # every start of genscale reads this module

    # Where each task has a GPU of its own (--gpus-per-task), that is its device 0.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    local_rank = "0" if visible and "," not in visible else os.environ["SLURM_LOCALID"]
    job, step, life = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    place = job + 61 * step + 997 * life
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
                   "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": _tasks_here(), "MASTER_ADDR": job_hosts()[0],
                   "MASTER_PORT": str(FIRST_PORT + place % PORTS)}


def _tasks_here() -> str:
    """From "2(x3),1": two tasks on each of three nodes, then one."""
    counts: list[str] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]
