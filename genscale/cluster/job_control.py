"""genscale slurm cancel | hold | release: jobs of runs that are in the queue already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from genscale.cluster import slurm_commands
from genscale.cluster.job_records import active_jobs, with_runs
from genscale.cluster.job_status import chosen
from genscale.cluster.slurm_commands import Queued
from genscale.errors import UserError


def cancel(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """Raises UserError where none of them has a job."""
    jobs = _jobs(folders, arguments, "cancel")
    slurm_commands.cancel([each.job for each in jobs])
    _tell(jobs, lambda job: f"cancelled job {job.job} ({job.state.lower()})")
    return 0


def hold(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """Their jobs do not start until they are released. Raises UserError where none of them has a job."""
    jobs = _jobs(folders, arguments, "hold")
    slurm_commands.control("hold", [each.job for each in jobs])
    _tell(jobs, lambda job: f"held job {job.job}" if job.state == "PENDING" else
          f"job {job.job} goes on ({job.state.lower()}), and is held when it is requeued")
    return 0


def release(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """Raises UserError where none of them has a job."""
    jobs = _jobs(folders, arguments, "release")
    slurm_commands.control("release", [each.job for each in jobs])
    _tell(jobs, lambda job: f"released job {job.job} ({job.state.lower()})")
    return 0


def _jobs(folders: Sequence[Path], arguments: Sequence[str], action: str) -> list[Queued]:
    if not folders:
        raise UserError(f"genscale slurm {action}: name the run folders whose jobs are meant")
    found = active_jobs(with_runs(chosen(folders, arguments, action)))
    if not found:
        raise UserError(f"genscale slurm {action}: no job of {', '.join(map(str, folders))} is in the queue")
    return found


def _tell(jobs: Sequence[Queued], line: Callable[[Queued], str]) -> None:
    for job in jobs:
        print(line(job))
