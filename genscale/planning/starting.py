"""A run that starts with `train.micro_batch_size: plan` asks the planner, on the machine that it starts on."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.errors import UserError
from genscale.parallel.launch_request import LaunchRequest, read_launch_request
from genscale.parallel.processes import on_cpu
from genscale.parallel.strategies import plan_parallel
from genscale.planning.account import Machine
from genscale.planning.choose import Chooser
from genscale.planning.plan import Plan, may_be_chosen, plan, with_size
from genscale.planning.profiles import GpuProfile, profile, profile_names
from genscale.planning.wording import gib
from genscale.settings.config import PLAN, Config
from genscale.supervise.run_folder import recorded_in, run_folder
from genscale.training.setup import derive_accumulation

LOOKING = 20.0
"""Seconds of computing to look for what would fit, where no micro-batch does."""


def with_planned_size(config: Config, gpu: GpuProfile | None = None) -> Config:
    """The config with a number where `train.micro_batch_size` is `plan`; any other is given back as it is.

    Every process of a run calls this before there is a process group, and finds the same. A run that goes on in as many
    processes on the same kind of device keeps the number that it has.

    Args:
        gpu: what is known of the devices; None: the profile of the kind that is here, with the memory that is here.

    Raises:
        UserError: no profile of the device, a family that cannot be planned, or nothing that would fit.
    """
    if config.train.micro_batch_size != PLAN:
        return config
    request = read_launch_request()
    derive_accumulation(with_size(config, None).train, request.world_size)
    gpu = gpu or _device_here(config, request)
    if size := _recorded_size(config, gpu, request.world_size):
        _say(request, f"{size}, with which the run began")
        return with_size(config, size)
    may_be_chosen(config, request.world_size)
    chosen = _planned(config, gpu, request)
    amount = f"{gib(chosen.peak)} +- {gib(chosen.expected_error)} GiB of {gib(gpu.memory_bytes)} on each {gpu.device}"
    size = chosen.step.micro_batch_size
    if not chosen.fits:
        nearest = Chooser(chosen, seconds=LOOKING, planner=lambda *asked: plan(*asked, gpu)).nearest_that_fits()
        instead = f"nearest that fits: {nearest.flags}" if nearest else "nothing that was looked at fits"
        raise UserError(f"train.micro_batch_size: plan finds none that surely fits: {size} takes {amount}; {instead}")
    _say(request, f"{size}, the largest that surely fits (planned: {amount})")
    return with_size(config, size)


def _planned(config: Config, gpu: GpuProfile, request: LaunchRequest) -> Plan:
    """Under the strategy and the precision that the launcher or the device settles."""
    spread = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
    settled = spread.settled(config)
    strategy: Any = spread.strategy
    settled = replace(settled, parallel=replace(settled.parallel, strategy=strategy))
    each = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(request.world_size, gpu.gpus_per_node)
    return plan(settled, Machine(gpu.name, request.world_size, each), gpu=gpu)


def _device_here(config: Config, request: LaunchRequest) -> GpuProfile:
    share = max(1, config.train.global_batch_size // request.world_size)
    if on_cpu():
        raise UserError("train.micro_batch_size: plan is for GPUs, and this run computes on the CPU, where nobody plans it; "
                        f"give a number, as {share}")
    here = torch.cuda.get_device_properties(request.local_rank)
    known = next((profile(name) for name in profile_names() if profile(name).device == here.name), None)
    if known is None:
        raise UserError(f"train.micro_batch_size: plan knows no {here.name}; give a number, as {share} (`genscale plan "
                        "--calibrate` makes a profile, with which `genscale plan` finds one)")
    return replace(known, memory_bytes=here.total_memory)


def _recorded_size(config: Config, gpu: GpuProfile, processes: int) -> int | None:
    """That of the checkpoint which the run goes on from, if it was made by as many processes on such devices."""
    recorded = recorded_in(run_folder(config.run), config.run.resume)
    if recorded is None:
        return None
    try:
        checkpoint = Checkpoint(recorded)
        about, size = checkpoint.manifest().get("about", {}), checkpoint.config()["train"]["micro_batch_size"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which is told where it is read
        return None
    if (about.get("world_size"), about.get("device")) != (processes, gpu.device) or not isinstance(size, int):
        return None
    return size if size > 0 and config.train.global_batch_size % (size * processes) == 0 else None


def _say(request: LaunchRequest, what: str) -> None:
    if request.rank == 0:
        print(f"train.micro_batch_size: plan is {what}", file=sys.stderr, flush=True)
