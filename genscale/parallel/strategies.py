"""Which strategy a run has, and what may be combined with it (docs/design.md, section 6): a cell says yes only where a
test does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from genscale.errors import UserError, refuse_unheeded
from genscale.models.batch_norm import BatchNorm
from genscale.objectives.base import Objective, Phase, check_networks
from genscale.parallel.engine import Engine
from genscale.parallel.launch_request import (
    LaunchRequest,
    read_launch_request,
    resolve_offload,
    resolve_precision,
    resolve_strategy,
)
from genscale.parallel.precision import check_float8
from genscale.parallel.processes import on_cpu
from genscale.settings.config import Config, ParallelSettings

SHARDS_MOST = "fsdp2"
"""The strategy that leaves each process the least to hold, for every objective."""


@dataclass(frozen=True)
class ParallelPlan:
    """How a run is spread, with nothing left to decide.

    Attributes:
        needs_group: a process group is needed even for one process.
        shard_size: `parallel.shard_size`; None: all processes.
        context: processes that read the same samples, and compute a part of each sequence.
    """

    strategy: str
    offload: str
    precision: str
    world_size: int
    shard_size: int | None = None
    context: int = 1

    @property
    def needs_group(self) -> bool:
        return self.strategy not in ("single", "ddp")

    def settled(self, config: Config) -> Config:
        """The config with what it may have left to the launcher and the device."""
        settled: dict[str, Any] = {"offload": self.offload, "precision": self.precision}  # each is one of the setting's words
        return replace(config, parallel=replace(config.parallel, offload=settled["offload"]),
                       train=replace(config.train, precision=settled["precision"]))

    def copies_of_weights(self, processes: int) -> float:
        """That so many of its processes hold between them."""
        if self.strategy == "zero3":
            return processes / self.world_size
        return processes / (self.shard_size or self.world_size) if self.strategy == "fsdp2" else processes


def plan_parallel(settings: ParallelSettings, precision: str, optimizer: str = "adamw") -> ParallelPlan:
    """Settle `parallel` and `train.precision` with what the launcher asked for; `optimizer` is `optimizer.name`.

    Raises UserError, before any process group exists."""
    request = read_launch_request()
    strategy = resolve_strategy(settings.strategy, request)
    plan = ParallelPlan(strategy, resolve_offload(settings.offload, strategy, request), resolve_precision(precision, request),
                        request.world_size, settings.shard_size, settings.context)
    check_combination(plan, optimizer)
    _check_settings(plan, settings)
    return plan


def plan_elsewhere(settings: ParallelSettings, precision: str, world_size: int, optimizer: str) -> ParallelPlan:
    """The plan of a run in as many processes on other machines than this one, whose devices only they know.

    Raises UserError for what would be refused on any."""
    request = LaunchRequest(None, None, None, world_size, rank=0, local_rank=0)
    strategy = resolve_strategy(settings.strategy, request)
    plan = ParallelPlan(strategy, resolve_offload(settings.offload, strategy, request), precision, world_size,
                        settings.shard_size, settings.context)
    _check_tested(plan, optimizer)
    _check_settings(plan, settings)
    return plan


def check_combination(plan: ParallelPlan, optimizer: str = "adamw") -> None:
    """Refuse what is wrong or untested, naming the combination, the reason and the nearest allowed one."""
    _check_tested(plan, optimizer)
    if plan.precision == "fp8":
        check_float8(on_cpu())
    if plan.precision == "bf16" and not on_cpu() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"train.precision: bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 "
                        f"(parallel.strategy single "
                        "or ddp) or fp32")


def _check_tested(plan: ParallelPlan, optimizer: str) -> None:
    strategy, precision = plan.strategy, plan.precision
    if precision == "fp16" and strategy not in ("single", "ddp"):
        raise UserError(f"train.precision: fp16 under parallel.strategy {strategy} is not supported (its loss "
                        f"scaler is tested for "
                        "single and ddp only); use train.precision bf16, which needs no scaling")
    if precision == "fp8" and strategy.startswith("zero"):
        raise UserError(f"train.precision: fp8 under parallel.strategy {strategy} is not supported (DeepSpeed has linear "
                        "layers of its own); use parallel.strategy fsdp2, or train.precision bf16")
    if optimizer == "muon" and strategy.startswith("zero"):
        raise UserError(f"optimizer.name: muon under parallel.strategy {strategy} is not supported (it needs whole matrices, "
                        "where ZeRO has flat partitions); use parallel.strategy fsdp2 or ddp, or optimizer.name adamw")


def _check_settings(plan: ParallelPlan, settings: ParallelSettings) -> None:
    if plan.precision == "fp8" and not settings.compile:
        raise UserError("train.precision: fp8 without parallel.compile is not supported (the casts of each product would be "
                        "kernels of their own, which cost what fp8 saves); set parallel.compile true, or train.precision bf16")
    if plan.strategy != "fsdp2":
        unheeded = ["reduce_gradients", "reshard_after_forward", "prefetch_blocks"]
        refuse_unheeded("parallel", settings, [*([] if plan.strategy == "zero3" else ["shard_size"]), *unheeded],
                        f"parallel.strategy {plan.strategy}")
    if settings.activation_offload:
        _check_offload(settings)
    for name, size in (("shard_size", settings.shard_size or 1), ("context", settings.context)):
        check_divides(name, size, plan.world_size)


def check_divides(name: str, size: int, world_size: int) -> None:
    """Raises UserError where groups of so many processes, of which setting `name` of `parallel` asks, do not come out even."""
    if world_size % size:
        nearest = max(divisor for divisor in range(1, min(size, world_size) + 1) if world_size % divisor == 0)
        raise UserError(f"parallel.{name}: {size} does not divide the {world_size} processes of the run; use {nearest}")


def _check_offload(settings: ParallelSettings) -> None:
    mode = settings.activation_checkpointing
    if mode != "full":
        raise UserError(f"parallel.activation_offload: true with parallel.activation_checkpointing {mode} is not supported "
                        "(all that a block computes would go to the host and back, which takes longer than to compute it "
                        "anew); set parallel.activation_checkpointing full")
    if settings.compile:
        raise UserError("parallel.activation_offload: true with parallel.compile is not supported (a compiled block keeps what "
                        "it chooses); use parallel.compile false")


def check_objective(plan: ParallelPlan, settings: ParallelSettings, objective: Objective) -> None:
    """Refuse an objective that the plan does not serve, naming the nearest combination that does.

    Raises:
        UserError: a phase takes gradients of gradients where there are none; a network is neither trained nor frozen.
    """
    check_networks(objective)
    for phase in objective.phases:
        if phase.second_order:
            _check_second_order(plan, settings, phase, objective.networks[phase.network])


def _check_second_order(plan: ParallelPlan, settings: ParallelSettings, phase: Phase, network: nn.Module) -> None:
    strategy, what = plan.strategy, f"a gradient penalty (phase {phase.name})"
    if strategy == "zero3":
        raise UserError(f"parallel.strategy: zero3 with {what} is not supported (it gives weights back between the first "
                        "backward and the second); use zero2 or fsdp2, or spectral norm instead of the penalty")
    if plan.precision == "fp8" or (plan.precision == "bf16" and strategy not in ("single", "ddp")):
        raise UserError(f"train.precision: {plan.precision} under parallel.strategy {strategy} with {what} is not supported "
                        "(it is computed in fp32, and the weights of the forward are not); use train.precision fp32, or "
                        "parallel.strategy ddp with bf16")
    if settings.activation_checkpointing == "selective":
        raise UserError(f"parallel.activation_checkpointing: selective with {what} is not supported (what is kept serves one "
                        "backward, and a penalty takes two); use full")
    if settings.activation_offload:
        raise UserError(f"parallel.activation_offload: true with {what} is not supported (it takes two backwards, and is "
                        "tested with one); leave it out")
    if settings.compile:
        raise UserError(f"parallel.compile: true with {what} is not supported (torch.compile has no second derivatives); use "
                        "parallel.compile false")
    if plan.world_size > 1 and any(isinstance(layer, BatchNorm) for layer in network.modules()):
        raise UserError(f"parallel.strategy: {strategy} on {plan.world_size} processes with {what} on {phase.network}, which "
                        "normalises over the batch, is not supported (a penalty by sample has no meaning there); use group "
                        f"normalisation or none in the {phase.network}")


def are_compiled(plan: ParallelPlan, settings: ParallelSettings) -> bool:
    """Whether a network's blocks are compiled: DeepSpeed's hooks keep torch from compiling one that is recomputed."""
    return settings.compile and not (plan.strategy == "zero3" and settings.activation_checkpointing != "none")


def hardly_heeded(plan: ParallelPlan, settings: ParallelSettings) -> list[str]:
    """A line of each setting that is asked for and does little under the plan."""
    if not settings.compile or plan.strategy != "zero3":
        return []
    return ["parallel.compile: true does little under parallel.strategy zero3 (DeepSpeed's hooks cut a block into pieces at "
            "every layer); parallel.strategy fsdp2 compiles whole blocks"]


def build_engine(plan: ParallelPlan, *args: Any, **kwargs: Any) -> Engine:
    """The engine of a plan; takes what `Engine` takes."""
    # Imported one at a time: DeepSpeed is slow to load and not needed by the others.
    if plan.strategy in ("single", "ddp"):
        from genscale.parallel.replicated import ReplicatedEngine

        return ReplicatedEngine(*args, **kwargs)
    if plan.strategy == "fsdp2":
        from genscale.parallel.fsdp2 import ShardedEngine

        return ShardedEngine(*args, **kwargs)
    from genscale.parallel.zero import ZeroEngine

    return ZeroEngine(int(plan.strategy.removeprefix("zero")), *args, **kwargs)
