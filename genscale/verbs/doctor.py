"""genscale doctor: what is wrong with this machine, or with the nodes of this job, before a run finds out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genscale.cluster.checks import Check, bad_nodes, report, worst
from genscale.cluster.doctor import full_check, group_check, job_check
from genscale.cluster.slurm_task import adopt_slurm_task
from genscale.errors import UserError
from genscale.parallel.launch_request import read_launch_request
from genscale.settings.config import Config
from genscale.settings.parser import parse_settings, split_flags, take_number

UNWELL = 1
"""Exit code where there is a failure among the checks."""
DESCRIPTION = (
    "Look at this machine, or at every node of a job: versions, GPUs and their driver, an all-reduce over all processes, disk, "
    "data, W&B, clocks, limits. Each line is ok, a warning with a remedy, or a failure; exit code 1 where there is a failure. "
    "With --config FILE and settings of the run, its folder, data and loader workers are looked at. --processes N starts N "
    "processes on this machine (by default one a GPU); `srun genscale doctor`, torchrun and accelerate launch bring their own. "
    "In a job's batch script, --quick asks every node of the job, in seconds.")


@dataclass
class DoctorSettings:
    """The flags of the doctor's own."""

    quick: bool = False
    """Only what takes seconds and loads no torch."""
    json: bool = False
    """One JSON object instead of text."""
    folder: str | None = None
    """Folder that a run would lie in, where there is no --config (default: runs)."""


OWN = ("quick", "json", "folder", "help")


def main(arguments: list[str]) -> int:
    """Exit code 0: nothing worse than warnings; 1: a failure."""
    processes, rest = take_number(arguments, "--processes", least=1)
    own, run = split_flags(rest, lambda name: name in OWN)
    if "-h" in rest or "--help" in own:
        own, run = ["--help"], []
    settings = parse_settings(DoctorSettings, own, "genscale doctor", DESCRIPTION)
    adopt_slurm_task()
    in_group = read_launch_request().world_size > 1
    if processes and (settings.quick or in_group):
        beside = "--quick, which starts none" if settings.quick else "a launcher that has started its own"
        raise UserError(f"--processes: {processes} has no effect with {beside}; leave it out")
    config, folder = _run_of(run, settings)
    if in_group:
        checks = group_check(folder, config, settings.quick)
    elif settings.quick:
        checks = job_check(folder, config.data.workers if config else 0)
    else:
        processes = processes or _gpus()
        if processes > 1:
            from genscale.parallel.launcher import run_workers

            return run_workers(processes, ["--module", "genscale", "doctor", *rest])
        checks = full_check(folder, config)
    state = worst(checks)
    if int(os.environ.get("RANK", "0")) == 0:
        print(as_json(checks) if settings.json else report(checks), flush=True)
    elif state == "failure":  # what rank 0 may never hear of
        print(report([check for check in checks if check.state == "failure"]), file=sys.stderr, flush=True)
    return UNWELL if state == "failure" else 0


def as_json(checks: Sequence[Check]) -> str:
    """The worst state, the nodes at fault and every check."""
    return json.dumps({"state": worst(checks), "bad_nodes": bad_nodes(checks), "checks": [check.as_dict() for check in checks]},
                      indent=1)


def _run_of(arguments: list[str], settings: DoctorSettings) -> tuple[Config | None, Path]:
    """The run that the arguments describe, and its folder."""
    if not arguments:
        return None, Path(settings.folder or "runs")
    from genscale.families import FAMILIES
    from genscale.settings.parser import parse_config
    from genscale.supervise.run_folder import run_folder

    config = parse_config(FAMILIES, arguments, "genscale doctor")
    return config, Path(settings.folder) if settings.folder else run_folder(config.run)


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())
