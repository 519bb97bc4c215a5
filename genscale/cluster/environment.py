"""The environment of Slurm's commands, of jobs and of their processes: every variable in one place, each with its reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

OF_SLURM = ("SLURM_*", "SLURMD_*", "SBATCH_*", "SRUN_*", "SALLOC_*", "SQUEUE_*", "SINFO_*", "SCANCEL_*", "SCONTROL_*",
            "SACCT_*")
"""What Slurm sets in a job, and what its commands take for options: in the shell of someone who submits they are another job's,
or habits (SBATCH_TIMELIMIT, SQUEUE_STATES, SLURM_TIME_FORMAT), and a job must go by neither."""
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*",
                 "PET_*", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GENSCALE_RUN", "GENSCALE_NODES",
                 "GENSCALE_SUBMIT", "GENSCALE_CODE", "GENSCALE_STOP_AT", "GENSCALE_PROCESSES", "GENSCALE_LAUNCHER")
"""What a launcher, or the script of a job, sets for the processes of one run."""
WHERE_SLURM_IS = ("SLURM_CONF", "SLURM_JWT")
"""Which cluster it is, and who one is there."""
OF_EVERY_JOB = ("SLURM_JOB_*", "SLURM_JOBID", "SLURM_NODELIST", "SLURM_NNODES", "SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID",
                "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SLURM_TASK_PID", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE",
                "SLURM_RESTART_COUNT", "SLURM_SUBMIT_*", "SLURM_CLUSTER_NAME", "SLURM_TOPOLOGY_*",
                "SLURMD_NODENAME")
"""What Slurm sets anew in each job of ours, whatever it was before (the restart count: in each life but the first)."""
OF_AN_ARRAY = ("SLURM_ARRAY_*",)
WITH_GPUS = ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")


def clean_environment(**others: str) -> dict[str, str]:
    """This process's environment for a command of Slurm's, and for a job: without what belongs to another job or launcher.

    Args:
        others: variables to set.
    """
    foreign = (*OF_SLURM, *OF_A_LAUNCHER)
    kept = {name: value for name, value in os.environ.items() if name in WHERE_SLURM_IS or not _is_any(name, foreign)}
    return kept | others


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def cleaning(array: bool, gpus: bool) -> list[str]:
    """Shell that does the same inside of a job, whoever submitted it, but for what is the job's own.

    Args:
        array: whether the job is an element of one.
        gpus: whether it has any.
    """
    own = (*WHERE_SLURM_IS, *OF_EVERY_JOB, *(OF_AN_ARRAY if array else ()), *(WITH_GPUS if gpus else ()))
    foreign = (*OF_SLURM, *OF_A_LAUNCHER)
    return ["for name in $(compgen -e); do", "    case $name in", f"        {_folded(own)}) ;;",
            f"        {_folded(foreign)}) unset \"$name\" ;;", "    esac", "done"]


def _folded(patterns: Sequence[str]) -> str:
    """A pattern of the shell's `case`, on lines that can be read."""
    lines, width = [""], 100
    for pattern in patterns:
        if len(lines[-1]) + len(pattern) > width:
            lines.append("")
        lines[-1] += f"{pattern} | "
    return "\\\n            ".join(lines).removesuffix(" | ")


@dataclass(frozen=True)
class Variable:
    """A variable of the environment; `value` may refer to others of the shell, and `why` says what it is for."""

    name: str
    value: str
    why: str


def communication(logs: str, collective_seconds: int, interface: str | None) -> list[Variable]:
    """For NCCL and gloo.

    Args:
        logs: folder for what is written when a collective fails.
        collective_seconds: how long a collective may wait before it fails, as the run sets its process groups up.
        interface: name of the network to use, as ib0; None: what the libraries choose.
    """
    why = "the network that the processes meet in"
    libraries = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    chosen = [Variable(name, interface, why) for name in libraries] if interface else []
    return [
        *chosen,
        Variable("TORCH_FR_BUFFER_SIZE", "2000", "flight recorder: the last collectives of every process are kept in memory,"),
        Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and written down when one of them fails, to see who was not there"),
        Variable("TORCH_FR_DUMP_TEMP_FILE", f"{logs}/nccl-rank-", "(one file a rank)"),
        Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(collective_seconds),
                 "as long as a collective waits: guards.hang_minutes knows more, and speaks first"),
        Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3", "a collective that fails ends its process; a hang would cost the job"),
        Variable("PYTHONUNBUFFERED", "1", "what is printed is in the log at once, also of a process that is killed"),
    ]  # fmt: skip
