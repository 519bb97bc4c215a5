"""What a run will take: whether it fits, how long it goes, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from genscale.errors import UserError
from genscale.families import family
from genscale.interop.source_runs import begins_from_run
from genscale.interop.starting import SCRATCH, complete_from
from genscale.parallel.strategies import plan_elsewhere
from genscale.planning.account import Certainty, Machine, MemoryPart, PlannedStep, PlannedTime
from genscale.planning.profiles import GpuProfile, profile
from genscale.settings.config import PLAN, Config
from genscale.supervise.run_folder import recorded_in, run_folder
from genscale.training.setup import check_settings, derive_accumulation

Verdict = Literal["fits", "too close", "does not fit"]
EXPECTED_ERROR: dict[Certainty, float] = {"exact": 0.0, "traced": 0.03, "replayed": 0.3, "modelled": 0.1, "assumed": 0.3}
"""Of a part of the memory, as a share of it. What is replayed is only what the caching allocator keeps beside the tensors."""
DISK_OF_A_NODE = 1e9
"""Bytes a second that the processes of one node write together, where nobody has measured it."""
OF_SAMPLES = ("activations", "logits and loss", "other", "caching allocator")
"""Categories of memory that grow with the micro-batch."""
HOUR, DAY = 3600, 86400


@dataclass(frozen=True)
class Terms:
    """What a plan is reckoned with, besides the config and the machine.

    Attributes:
        spare: share of the device's memory that must stay free.
        price: of an hour of one GPU, in any currency.
        tokens: of the whole run, where it is not `train.steps` that says how long it goes.
    """

    spare: float = 0.1
    price: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class Plan:
    """A config on a machine.

    Attributes:
        config: with its strategy and its precision settled.
        gpu: what is known of the machine's devices.
    """

    config: Config
    machine: Machine
    gpu: GpuProfile
    terms: Terms
    step: PlannedStep
    time: PlannedTime

    @property
    def peak(self) -> int:
        """Bytes of one rank."""
        return self.step.memory.peak

    @property
    def expected_error(self) -> int:
        """Bytes by which the peak may be wrong, either way: the errors of its parts added up."""
        return round(sum(map(expected_error, self.step.memory.parts)))

    @property
    def verdict(self) -> Verdict:
        """It fits where the peak, its expected error and the spare memory do; between that and what cannot fit lies what may
        run out of memory."""
        if self.peak + self.expected_error <= self.gpu.memory_bytes * (1 - self.terms.spare):
            return "fits"
        return "too close" if self.peak - self.expected_error <= self.gpu.memory_bytes else "does not fit"

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        if self.terms.tokens is None:
            return int(self.config.train.steps)
        if not self.step.tokens:
            raise UserError(f"--tokens: {self.terms.tokens:g}, but family {self.config.model.family} trains on no text; set "
                            "--train.steps")
        return math.ceil(self.terms.tokens / self.step.tokens)

    @property
    def seconds(self) -> float:
        """Time of the whole run: its steps, and what checkpoints hold them up."""
        return self.steps * (self.time.step + self.checkpoint_seconds / self.steps_between_checkpoints)

    @property
    def gpu_hours(self) -> float:
        return self.machine.gpus * self.seconds / HOUR

    @property
    def money(self) -> float | None:
        return None if self.terms.price is None else self.terms.price * self.gpu_hours

    @property
    def unit(self) -> str:
        """What speed counts."""
        return "tokens" if self.step.tokens else "samples"

    @property
    def units_per_second(self) -> float:
        return (self.step.tokens or self.step.samples) / self.time.step

    @property
    def checkpoint_seconds(self) -> float:
        """From the start of a checkpoint to its end on the disk, if the steps waited for it."""
        nodes = -(-self.machine.gpus // self.machine.gpus_per_node)
        speed = self.machine.gpus * self.gpu.disk or nodes * DISK_OF_A_NODE
        return self.step.memory.checkpoint_bytes / speed

    @property
    def steps_between_checkpoints(self) -> int:
        train = self.config.train
        by_time = int(60 * train.checkpoint_minutes / self.time.step) if train.checkpoint_minutes else 0
        return max(1, min(filter(None, (train.checkpoint_every, by_time, train.steps))))

    @property
    def checkpoint_share(self) -> float:
        """Share of the run's time, if the steps waited for each checkpoint."""
        between = self.steps_between_checkpoints * self.time.step
        return self.checkpoint_seconds / (between + self.checkpoint_seconds)


def expected_error(part: MemoryPart) -> float:
    """Bytes by which one part of the memory may be wrong."""
    return EXPECTED_ERROR[part.certainty] * part.bytes


def shaped(config: Config) -> Config:
    """With the shape of the model or of the run that it begins from (`model.from`), as a run has it when it starts.

    Raises:
        UserError: it cannot be read here, for a plan fetches nothing.
    """
    name = getattr(config.model, "from_", None)
    if name in (None, SCRATCH) or getattr(config.model, "started", None) is not None:
        return config
    recorded = recorded_in(run_folder(config.run), config.run.resume)
    if recorded is None and not Path(name).expanduser().exists() and not begins_from_run(config):
        raise UserError(f"model.from: there is no folder {name} here, a run's or a model's, to say what shape it has; a plan "
                        f"fetches nothing (`hf download {name} --local-dir DIR`, and model.from DIR, would)")
    return complete_from(config, recorded)[0]


def plan(config: Config, machine: Machine, terms: Terms | None = None, gpu: GpuProfile | None = None) -> Plan:
    """Plan a run, without its data and without its devices; with `train.micro_batch_size: plan` that of the largest micro-batch
    that surely fits, or of the smallest one where none does.

    Args:
        gpu: what is known of the machine's devices; None: their profile.

    Raises:
        UserError: what `genscale train` would refuse on that machine, in the same words; a GPU that is not known; a family that
            has no blueprint.
    """
    return plan_shaped(shaped(config), machine, terms, gpu)


def plan_shaped(config: Config, machine: Machine, terms: Terms | None = None, gpu: GpuProfile | None = None) -> Plan:
    """`plan` of a config that needs no other run or model to say its shape."""
    from genscale.planning.time import time_of
    from genscale.planning.trace import CPU, plan_step

    gpu = gpu or profile(machine.gpu)
    if config.train.micro_batch_size == PLAN:
        share = derive_accumulation(with_size(config, None).train, machine.gpus, config.parallel.context)[0]
        may_be_chosen(config, machine.gpus)
        return largest_that_fits(share, lambda size: plan_shaped(with_size(config, size), machine, terms, gpu))
    config = settled(config, machine, gpu)
    _check_batch(config, machine, gpu)
    step = plan_step(config, machine if gpu.device != CPU else replace(machine, gpu=CPU))  # a profile of one's own, perhaps
    time = time_of(step, machine, gpu, config.train.precision, config.parallel.compile)
    made = Plan(config, machine, gpu, terms or Terms(), step, time)
    _ = made.steps  # or why there are none
    return made


def _check_batch(config: Config, machine: Machine, gpu: GpuProfile) -> None:
    """Raises UserError where the samples of a micro-batch alone are more than a device holds: to trace them takes for ever."""
    size = derive_accumulation(config.train, machine.gpus, config.parallel.context)[0]
    sample = sum(value.nbytes for value in family(config.model.family).blueprint(config).sample.values())
    if sample * size > gpu.memory_bytes:
        raise UserError(f"train.micro_batch_size: {size:,} samples of {sample:,} bytes are more than {gpu.device} holds; "
                        f"set at most {max(1, gpu.memory_bytes // sample):,}")


def with_size(config: Config, size: int | None) -> Config:
    """With that micro-batch size."""
    return replace(config, train=replace(config.train, micro_batch_size=size))


def peak_with(plan: Plan, size: int) -> float:
    """About what the peak would be with another micro-batch size."""
    by_sample = sum(part.bytes for part in plan.step.memory.parts if part.category in OF_SAMPLES)
    return plan.peak - by_sample * (1 - size / plan.step.micro_batch_size)


def may_be_chosen(config: Config, processes: int) -> None:
    """Raises UserError where the planner cannot choose the micro-batch of a run, or where it would be another run with each."""
    share = max(1, config.train.global_batch_size * config.parallel.context // processes)
    try:
        objective = family(config.model.family).blueprint(with_size(config, None)).objective
    except UserError as error:
        raise UserError(f"train.micro_batch_size: plan needs a run that can be planned; give a number, as {share} ({error})"
                        ) from None
    if objective.couples_samples:
        raise UserError("train.micro_batch_size: plan would let the kind of GPU decide which samples of a step are normalised "
                        f"or judged together, and so what is learned; give a number, as {share}")


def largest_that_fits(share: int, planned: Callable[[int], Plan]) -> Plan:
    """The plan with the largest micro-batch that surely fits; with the smallest one where none does.

    Args:
        share: samples of one process in a step, of which a micro-batch is a divisor.
        planned: gives the plan with a micro-batch size. Far too large ones are not asked for: they take long.
    """
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    found, fitting, too_large = planned(sizes[0]), 0, len(sizes)
    while found.fits and fitting + 1 < too_large:
        room = found.gpu.memory_bytes * (1 - found.terms.spare) - found.expected_error
        near = [place for place in range(fitting + 1, too_large) if peak_with(found, sizes[place]) <= room]
        place = near[-1] if near else fitting + 1
        tried = planned(sizes[place])
        if tried.fits:
            found, fitting = tried, place
        else:
            too_large = place
    return found


def settled(config: Config, machine: Machine, gpu: GpuProfile) -> Config:
    """The config with strategy and precision as they will be on the machine.

    Raises:
        UserError: what `genscale train` would refuse there and can be told without building a network.
    """
    check_settings(config)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if _computes_in(gpu, "bf16") else "fp32"
    spread = plan_elsewhere(config.parallel, precision, machine.gpus, config.optimizer.name)
    if precision == "bf16" and not _computes_in(gpu, precision):
        raise UserError(f"train.precision: bf16 is not supported by {gpu.device}; use fp16 (parallel.strategy single or ddp) "
                        "or fp32")
    if precision == "fp8" and not _computes_in(gpu, precision):
        raise UserError("train.precision: fp8 needs an NVIDIA GPU of the Hopper generation or newer, not "
                        f"{gpu.device}; use bf16")
    derive_accumulation(config.train, machine.gpus, config.parallel.context)
    config = spread.settled(config)
    strategy: Any = spread.strategy  # one of the setting's words
    return replace(config, parallel=replace(config.parallel, strategy=strategy))


def _computes_in(gpu: GpuProfile, precision: str) -> bool:
    try:
        return bool(gpu.peak(precision))
    except UserError:
        return False
