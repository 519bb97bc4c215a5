"""Which strategy a run has, and what may be combined with it (house plan, section 6): a cell says yes only where a
test does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from genscale.config import ParallelSettings
from genscale.errors import UserError
from genscale.parallel.engine import Engine
from genscale.parallel.launcher import read_launch_request, resolve_offload, resolve_precision, resolve_strategy
from genscale.parallel.processes import on_cpu


@dataclass(frozen=True)
class ParallelPlan:
    """How a run is spread, with nothing left to decide.

    Attributes:
        needs_group: a process group is needed even for one process.
    """

    strategy: str
    offload: str
    precision: str
    world_size: int

    @property
    def needs_group(self) -> bool:
        return self.strategy not in ("single", "ddp")


def plan_parallel(settings: ParallelSettings, precision: str) -> ParallelPlan:
    """Settle `parallel` and `train.precision` with what the launcher asked for. Raises UserError, before any process
    group exists."""
    request = read_launch_request()
    strategy = resolve_strategy(settings.strategy, request)
    plan = ParallelPlan(strategy, resolve_offload(settings.offload, strategy, request), resolve_precision(precision, request),
                        request.world_size)
    check_combination(plan, settings)
    return plan


def check_combination(plan: ParallelPlan, settings: ParallelSettings) -> None:
    """Refuse what is wrong or untested, naming the combination, the reason and the nearest allowed one."""
    strategy, precision = plan.strategy, plan.precision
    if precision == "fp16" and strategy not in ("single", "ddp"):
        raise UserError(f"train.precision: fp16 under parallel.strategy {strategy} is not supported (its loss "
                        f"scaler is tested for "
                        "single and ddp only); use train.precision bf16, which needs no scaling")
    if settings.activation_checkpointing == "selective" and strategy == "zero3":
        raise UserError("parallel.activation_checkpointing: selective under parallel.strategy zero3 trains wrongly "
                        "without a word (DeepSpeed 0.19.8 adds the bias in place to the product it kept); use full, or "
                        "parallel.strategy fsdp2")
    if precision == "bf16" and not on_cpu() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"train.precision: bf16 is not supported by {torch.cuda.get_device_name()}; use fp16 "
                        f"(parallel.strategy single "
                        "or ddp) or fp32")


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
