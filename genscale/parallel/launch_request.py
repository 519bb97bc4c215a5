"""What the launcher asked for.

Accelerate's launcher speaks to its workers through environment variables. This module reads them once, holds them against the
run's `parallel` section, and then removes those through which Accelerate would quietly decide a second time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from genscale.errors import UserError


@dataclass(frozen=True)
class LaunchRequest:
    """What the launcher was configured with; None where it said nothing.

    Attributes:
        strategy: `zero1`, `zero2`, `zero3` or `fsdp2`. Accelerate's MULTI_GPU and torchrun only start processes: None.
        offload: `cpu` when DeepSpeed was asked to keep the optimizer state in host memory.
        precision: `bf16` or `fp16`. Accelerate's default "no" is silence, not a wish for fp32.
        world_size, rank, local_rank: this process among all processes, and among those of its machine.
    """

    strategy: str | None
    offload: str | None
    precision: str | None
    world_size: int
    rank: int
    local_rank: int


def read_launch_request() -> LaunchRequest:
    """Reads the environment left by `accelerate launch`, torchrun, or no launcher at all (a single process).

    Call it before `clear_launch_environment`. Raises UserError for what the launcher can be configured with and genscale
    does not do.
    """
    rank, world_size, local_rank = _read_process_numbers()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision of the launcher: {precision} is not supported; leave it out and set train.precision")
    strategy, offload = _read_strategy()
    return LaunchRequest(
        strategy=strategy,
        offload=offload,
        precision=None if precision == "no" else precision,
        world_size=world_size,
        rank=rank,
        local_rank=local_rank,
    )


def resolve_strategy(asked: str, request: LaunchRequest) -> str:
    """The strategy of the run, from `parallel.strategy` and the launcher. Raises UserError when the two contradict."""
    if asked == "auto":
        return request.strategy or ("ddp" if request.world_size > 1 else "single")
    if request.strategy not in (None, asked):
        raise UserError(
            f"parallel.strategy: {asked} contradicts the launcher, which was configured for {request.strategy}; "
            f"set parallel.strategy to {request.strategy} or auto, or launch with a file for {asked}"
        )
    if asked == "single" and request.world_size > 1:
        raise UserError(
            f"parallel.strategy: single means one process, but the launcher started {request.world_size}; "
            "nearest allowed: ddp (or auto)"
        )
    return asked


def resolve_offload(asked: str, strategy: str, request: LaunchRequest) -> str:
    """The offload of the run, from `parallel.offload` and the launcher: either may ask for it, "none" is silence on both sides.

    `strategy` is the resolved one. Raises UserError for offload without ZeRO.
    """
    offload = request.offload or asked
    if offload != "none" and not strategy.startswith("zero"):
        raise UserError(f"parallel.offload: {offload} needs ZeRO, but the strategy is {strategy}; nearest allowed: none, "
                        "or parallel.strategy zero1, zero2 or zero3")
    return offload


def resolve_precision(asked: str, request: LaunchRequest) -> str:
    """The precision of the run: `train.precision`, with auto the launcher's or the device's own. Raises UserError when the
    launcher explicitly asked for another."""
    if asked == "auto":
        from genscale.parallel.precision import native_precision
        from genscale.parallel.processes import on_cpu

        return request.precision or native_precision(on_cpu())
    if request.precision not in (None, "bf16" if asked == "fp8" else asked):  # fp8 computes in bf16 what it does not in fp8
        raise UserError(
            f"train.precision: {asked} contradicts the launcher, which was configured with mixed_precision {request.precision}"
            f"; set train.precision to {request.precision}, or leave mixed_precision out of the launcher's file"
        )
    return asked


def clear_launch_environment() -> None:
    """Removes from this process what would make Accelerate decide again, and otherwise than genscale.

    Ranks, addresses, threads and ACCELERATE_USE_CPU stay: they say who we are and on which device.
    """
    for name in list(os.environ):
        if name in _DECISIONS or name.startswith(_DECISION_PREFIXES):
            del os.environ[name]


# With these set, `Accelerator()` builds its own DeepSpeed, FSDP or Megatron plugin, and prepares with that whatever it is
# given. Under ACCELERATE_USE_CPU=true it drops the DeepSpeed plugin again, and wraps in plain DDP, without a word: genscale
# makes the DeepSpeed engine itself, so that ACCELERATE_USE_CPU means the device and nothing more. MIXED_PRECISION adds a second
# autocast, GRADIENT_ACCUMULATION_STEPS divides the loss a second time, and DYNAMO compiles the whole network.
_DECISIONS = frozenset({
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_CONFIG_DS_FIELDS",
})  # fmt: skip
_DECISION_PREFIXES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")  # as Accelerate reads its flags


def _read_process_numbers() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in names if name in os.environ]
    if found:
        missing = [name for name in names if name not in os.environ]
        # A lone variable (LOCAL_RANK=0 from a notebook, WORLD_SIZE=1 from a shell) is harmless; half a launcher is not.
        if missing and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{missing[0]}: not set, although WORLD_SIZE is {os.environ['WORLD_SIZE']}; start the processes "
                            "with accelerate launch, torchrun or genscale train --processes N")
        if not missing:
            try:
                rank, world_size, local_rank = (int(os.environ[name]) for name in names)
            except ValueError:
                values = ", ".join(f"{name}={os.environ[name]}" for name in names)
                raise UserError(f"{values}: must be whole numbers; the launcher sets them") from None
            return rank, world_size, local_rank
    # `distributed_type: MULTI_CPU` and `--cpu` start ONE process whatever num_processes says, unless mpirun is used. Only this
    # one-process launcher sets ACCELERATE_USE_CPU, and MASTER_PORT beside it only when more than one was wanted.
    elif "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError("num_processes of the launcher: more than 1 was asked for, but accelerate launch starts only one "
                        "process with --cpu or distributed_type NO or MULTI_CPU; use launch/cpu.yaml, or --num_processes 1")
    return 0, 1, 0


def _read_strategy() -> tuple[str | None, str | None]:
    """The launcher's (strategy, offload)."""
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _flag(f"ACCELERATE_USE_{name}"):
            raise UserError(f"parallel.strategy: the launcher was configured for {name.lower()}, which is not supported; "
                            "nearest allowed: launch/zero3.yaml or launch/fsdp2.yaml")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return _read_deepspeed()
    if _flag("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version of the launcher: 1 is not supported; nearest allowed: 2 (as in launch/fsdp2.yaml)")
        if _flag("FSDP_OFFLOAD_PARAMS"):
            raise UserError("fsdp_offload_params of the launcher: true is not supported; nearest allowed: false, or offload of "
                            "the optimizer with launch/zero3-offload.yaml")
        return "fsdp2", None
    return None, None


def _read_deepspeed() -> tuple[str, str | None]:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        raise UserError(f"deepspeed_config_file of the launcher: {file} would be ignored, because the run's own config sets "
                        "DeepSpeed up; use zero_stage instead (as in launch/zero2.yaml)")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
    if stage not in ("1", "2", "3"):
        raise UserError(f"zero_stage of the launcher: {stage} is not a ZeRO stage; nearest allowed: "
                        f"{'3' if stage > '3' else '1'}, or launch/ddp.yaml")
    optimizer = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    weights = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if optimizer not in ("none", "cpu"):
        raise UserError(f"offload_optimizer_device of the launcher: {optimizer} is not supported; nearest allowed: cpu")
    if weights != "none":
        raise UserError(f"offload_param_device of the launcher: {weights} is not supported; nearest allowed: none, with "
                        "offload_optimizer_device: cpu")
    return f"zero{stage}", None if optimizer == "none" else optimizer
