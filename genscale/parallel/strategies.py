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
from genscale.parallel.precision import check_float8
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


def plan_parallel(settings: ParallelSettings, precision: str, optimizer: str = "adamw") -> ParallelPlan:
    """Settle `parallel` and `train.precision` with what the launcher asked for; `optimizer` is `optimizer.name`.

    Raises UserError, before any process group exists."""
    request = read_launch_request()
    strategy = resolve_strategy(settings.strategy, request)
    plan = ParallelPlan(strategy, resolve_offload(settings.offload, strategy, request), resolve_precision(precision, request),
                        request.world_size)
    check_combination(plan, optimizer)
    return plan


def check_combination(plan: ParallelPlan, optimizer: str = "adamw") -> None:
    """Refuse what is wrong or untested, naming the combination, the reason and the nearest allowed one."""
    strategy, precision = plan.strategy, plan.precision
    if precision == "fp16" and strategy not in ("single", "ddp"):
        raise UserError(f"train.precision: fp16 under parallel.strategy {strategy} is not supported (its loss "
                        f"scaler is tested for "
                        "single and ddp only); use train.precision bf16, which needs no scaling")
    if precision == "fp8":
        if strategy.startswith("zero"):
            raise UserError(f"train.precision: fp8 under parallel.strategy {strategy} is not supported (DeepSpeed has linear "
                            "layers of its own); use parallel.strategy fsdp2, or train.precision bf16")
        check_float8(on_cpu())
    if optimizer == "muon" and strategy.startswith("zero"):
        raise UserError(f"optimizer.name: muon under parallel.strategy {strategy} is not supported (it needs whole matrices, "
                        "where ZeRO has flat partitions); use parallel.strategy fsdp2 or ddp, or optimizer.name adamw")
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
