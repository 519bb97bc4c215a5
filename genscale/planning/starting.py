"""A run that starts with `train.micro_batch_size: plan` asks the planner, on the machine that it starts on.

It plans in a process of its own: torch remembers of a device mesh where in it this process stands, and in a planned one each
stands first, so that a process that has planned would take another's part of the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.parallel.launch_request import LaunchRequest, read_launch_request
from genscale.parallel.processes import on_cpu
from genscale.parallel.strategies import plan_parallel
from genscale.planning.account import Machine
from genscale.planning.choose import Chooser
from genscale.planning.plan import plan, plan_shaped, with_size
from genscale.planning.profiles import GpuProfile, profile, profile_names
from genscale.planning.wording import gib
from genscale.settings.config import PLAN, Config
from genscale.settings.parser import load_config
from genscale.supervise.run_folder import config_yaml, recorded_in, run_folder
from genscale.training.setup import derive_accumulation

LOOKING = 20.0
"""Seconds of computing to look for what would fit, where no micro-batch does."""
ASK = "from genscale.planning.starting import answer; answer()"


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
    derive_accumulation(with_size(config, None).train, request.world_size, config.parallel.context)
    gpu = gpu or _device_here(config, request)
    size = recorded_size(config, gpu, request.world_size)
    found = f"{size}, with which the run began"
    if size is None:
        size, amount = _asked(*_question(config, gpu, request))
        found = f"{size}, the largest that surely fits (planned: {amount})"
    if request.rank == 0:
        print(f"train.micro_batch_size: plan is {found}", file=sys.stderr, flush=True)
    return with_size(config, size)


def recorded_size(config: Config, gpu: GpuProfile, processes: int) -> int | None:
    """That of the checkpoint which the run goes on from, if it was made by as many processes on such devices."""
    recorded = recorded_in(run_folder(config.run), config.run.resume)
    if recorded is None:
        return None
    try:
        checkpoint = Checkpoint(recorded)
        about, recorded_config = checkpoint.manifest().get("about", {}), checkpoint.config()
        size, context = recorded_config["train"]["micro_batch_size"], recorded_config.get("parallel", {}).get("context", 1)
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which is told where it is read
        return None
    here = processes, gpu.device, config.parallel.context
    if (about.get("world_size"), about.get("device"), context) != here or not isinstance(size, int):
        return None
    return size if size > 0 and config.train.global_batch_size % (size * (processes // context)) == 0 else None


def _device_here(config: Config, request: LaunchRequest) -> GpuProfile:
    share = max(1, config.train.global_batch_size * config.parallel.context // request.world_size)
    if on_cpu():
        raise UserError("train.micro_batch_size: plan is for GPUs, and this run computes on the CPU, where nobody plans it; "
                        f"give a number, as {share}")
    here = torch.cuda.get_device_properties(request.local_rank)
    known = next((profile(name) for name in profile_names() if profile(name).device == here.name), None)
    if known is None:
        raise UserError(f"train.micro_batch_size: plan knows no {here.name}; give a number, as {share} (`genscale plan "
                        "--calibrate` makes a profile, with which `genscale plan` finds one)")
    return replace(known, memory_bytes=here.total_memory)


def _question(config: Config, gpu: GpuProfile, request: LaunchRequest) -> tuple[Config, Machine, GpuProfile]:
    """Under the strategy and the precision that the launcher or the device settles."""
    spread = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
    settled = spread.settled(config)
    strategy: Any = spread.strategy  # one of the setting's words
    each = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(request.world_size, gpu.gpus_per_node)
    return (replace(settled, parallel=replace(settled.parallel, strategy=strategy)),
            Machine(gpu.name, request.world_size, each), gpu)


def _asked(config: Config, machine: Machine, gpu: GpuProfile) -> tuple[int, str]:
    """The micro-batch size and what it takes, in words. Raises UserError."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    question = {"config": config_yaml(config), "machine": asdict(machine), "gpu": asdict(gpu)}
    done = subprocess.run([sys.executable, "-c", ASK], input=json.dumps(question), capture_output=True, text=True,
                          errors="replace", env=environment, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"train.micro_batch_size: plan cannot be asked, for the process that plans has failed ({why}); give a "
                        "number")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "refused" in said:
        raise UserError(said["refused"])
    return said["size"], said["amount"]


def answer() -> None:
    """In the process that plans: reads a question from standard input, and writes the answer to standard output."""
    asked = json.load(sys.stdin)
    try:
        said = answered(_read(asked["config"]), Machine(**asked["machine"]), GpuProfile(**asked["gpu"]))
    except UserError as error:
        said = {"refused": str(error)}
    print(json.dumps(said))


def _read(config: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config)
        try:
            return load_config(FAMILIES, file)
        except UserError as error:  # of a family or a reward that stands in the script which has been started
            raise UserError("train.micro_batch_size: plan is asked in a process of its own, which knows no family and no "
                            f"reward of a script or a notebook ({error}); give a number, or make a package of it") from None


def answered(config: Config, machine: Machine, gpu: GpuProfile) -> dict[str, Any]:
    """The micro-batch size, and what it takes in words. Raises UserError."""
    chosen = plan(config, machine, gpu=gpu)
    size = chosen.step.micro_batch_size
    amount = f"{gib(chosen.peak)} +- {gib(chosen.expected_error)} GiB of {gib(gpu.memory_bytes)} on each {gpu.device}"
    if chosen.fits:
        return {"size": size, "amount": amount}
    planner = partial(plan_shaped, gpu=gpu)
    nearest = Chooser(chosen, seconds=LOOKING, planner=planner).nearest_that_fits()
    instead = f"nearest that fits: {nearest.flags}" if nearest else "nothing that was looked at fits"
    raise UserError(f"train.micro_batch_size: plan finds none that surely fits: {size} takes {amount}; {instead}")
