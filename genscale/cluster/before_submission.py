"""What is found wrong with a job before it is submitted, besides its config and its partition."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from genscale.cluster.environment import clean_environment
from genscale.cluster.job_records import active_jobs, jobs_of, with_runs
from genscale.cluster.lives import read_ended
from genscale.cluster.site import Site, user_file
from genscale.cluster.slurm_commands import Queued
from genscale.errors import UserError
from genscale.supervise.run_owner import who_has

LAUNCH_FILE = Path("launch/ddp.yaml")
"""As a job's script names it: in its copy of the code, or, without one, in the folder that it is submitted from."""
SETUP_SECONDS = 120


def check_launch_file() -> None:
    """Raises UserError where the launcher accelerate would not find its own, for a job without a copy of the code."""
    if not LAUNCH_FILE.is_file():
        raise UserError(f"--launcher: accelerate reads {LAUNCH_FILE}, which is not in {Path.cwd()}; leave "
                        "--no-snapshot out, submit from the folder that genscale was cloned into, or with --launcher srun")


def check_is_free(run: Path, queue: Sequence[Queued]) -> None:
    """Raises UserError for a run that somebody trains, or is about to."""
    if own := active_jobs([run], queue):
        raise UserError(f"run.name: {run} has a job already: {own[0].job} ({own[0].state.lower()}); wait for it, end it with "
                        f"`genscale slurm cancel {shlex.quote(str(run))}`, or choose another name (-- --run.name NAME)")
    if owner := who_has(run):
        raise UserError(f"run.name: {run} belongs to a run that goes on: {owner}; wait for it, stop it, or choose another name "
                        "(-- --run.name NAME)")


def check_setup(site: Site) -> None:
    """That the lines of the site lead to a Python that has genscale: on a node, it would be found out hours later."""
    lines = [*site.module_lines(), "set -e", *site.setup_lines(None), *(f"export {name}={shlex.quote(value)}" for name, value in
                                                  site.environment.items()), "python -m genscale --version"]
    try:
        done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=SETUP_SECONDS,
                              env=clean_environment())
    except subprocess.TimeoutExpired:
        raise UserError(f"site.setup: Python does not start within {SETUP_SECONDS} s after "
                        f"`{'; '.join(site.setup_lines(None))}`") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        raise UserError(f"site.setup: `{'; '.join(site.setup_lines(None))}` does not lead to a Python that has genscale: "
                        f"{said}; set modules and setup in {user_file()}, or in launch/site.yaml of a clone")


def wait_for(words: Sequence[str]) -> str:
    """sbatch's dependency on the jobs of those run folders; empty where all of the runs are complete. Raises UserError."""
    jobs: dict[str, None] = {}
    for folder in map(Path, words):
        own, active = jobs_of(folder), active_jobs(with_runs([folder]))
        if not active and (read_ended(folder) or {}).get("how") != "complete":
            raise UserError(f"--after: {folder} has no job in the queue, and is no run that is complete")
        # All of an array is one word.
        jobs |= dict.fromkeys(base if (base := each.job.partition("_")[0]) in own else each.job for each in active)
    return f"afterok:{':'.join(jobs)}" if jobs else ""
