"""Whether the runs of a job fit into the memory of its GPUs, as `genscale plan` has it."""

from __future__ import annotations

import re
import sys

from genscale.cluster.prepared_job import Prepared, check_configs
from genscale.errors import UserError
from genscale.settings.config import Config

LOOKING = 60.0
"""Seconds to look for what would fit."""


def check_memory(prepared: Prepared) -> None:
    """Raises UserError where a run cannot fit into the memory of the job's GPUs, with the nearest that can."""
    job = prepared.job
    if not job.gpus_per_node:
        return
    gpu = profile_of(job.gpus.kind)
    if gpu is None:
        kind = f"'{job.gpus.kind}' is no kind of GPU that it knows" if job.gpus.kind else "it is not said which kind they are"
        print(f"not planned whether it fits into the GPUs: {kind} (--gpus-per-node h100:{job.gpus_per_node} would say it)",
              file=sys.stderr)
        return
    check_configs(prepared, lambda config: _check(config, gpu, job.world_size, job.gpus_per_node))


def profile_of(kind: str | None) -> str | None:
    """The profile of what a cluster calls `kind`; of several sizes of one the largest, for no job is to be refused that might
    be given that."""
    from genscale.planning.profiles import profile, profile_names

    if kind is None:
        return None
    word = kind.lower().replace("_", "-").removeprefix("nvidia-")
    names = profile_names()
    meant = [name for name in names if re.fullmatch(rf"{re.escape(word)}(-\d+)?", name)]
    if not meant:  # nvidia_h100_80gb_hbm3
        meant = [name for name in names if profile(name).device.lower().replace(" ", "-").removeprefix("nvidia-") == word]
    return max(meant, key=lambda name: profile(name).memory_bytes, default=None)


def _check(config: Config, gpu: str, gpus: int, gpus_per_node: int) -> None:
    from genscale.planning.account import Machine
    from genscale.planning.choose import Chooser
    from genscale.planning.plan import plan
    from genscale.planning.wording import gib

    try:
        planned = plan(config, Machine(gpu, gpus, gpus_per_node))
    except UserError as error:  # which is not for the planner to refuse
        print(f"not planned whether it fits into the GPUs: {error}", file=sys.stderr)
        return
    if planned.fits:
        return
    amount = f"{gib(planned.peak)} +- {gib(planned.expected_error)} GiB of {gib(planned.gpu.memory_bytes)} on each {gpu}"
    if planned.verdict == "too close":
        print(f"warning: the run may not fit into the memory of its GPUs: planned {amount}", file=sys.stderr)
        return
    nearest = Chooser(planned, seconds=LOOKING).nearest_that_fits()
    instead = f"nearest that fits: {nearest.flags}" if nearest else "nothing that was looked at fits"
    raise UserError(f"train.micro_batch_size: {planned.step.micro_batch_size} under parallel.strategy "
                    f"{planned.config.parallel.strategy} cannot fit into memory: planned {amount}; {instead}; --no-plan submits"
                    " it all the same")
