"""What to tell a user whose run does not fit in memory."""

from __future__ import annotations

import shlex
from dataclasses import replace

import torch

from genscale.errors import UserError
from genscale.models.network_parts import blocks_of
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine
from genscale.parallel.strategies import SHARDS_MOST, ParallelPlan, check_combination, check_objective
from genscale.settings.config import Config, ParallelSettings
from genscale.supervise.run_folder import run_folder

WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "std::bad_alloc",
         "cublas_status_alloc_failed")
ONEDNN = "could not create a primitive"
"""All that oneDNN says; of a kind of operation that it has not, it says "could not create a primitive descriptor for ..."."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what an error is about, of the device or the host; also one that a library has wrapped."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, RuntimeError) and (any(word in str(cause).lower() for word in WORDS) or str(cause) == ONEDNN):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def advice(config: Config, engine: Engine, objective: Objective) -> str:
    """One line: where memory ran out, the settings that decide how much of it is needed, and what to try first."""
    processes = engine.processes
    facts = [f"train.micro_batch_size is {engine.micro_batch_size}"]
    sizes = [name for name in ("sequence_length", "size") if hasattr(config.data, name)]
    facts += [f"data.{name} is {getattr(config.data, name)}" for name in sizes]
    facts += [f"parallel.activation_checkpointing is {config.parallel.activation_checkpointing}",
              f"parallel.strategy is {engine.strategy}"]
    where = "the host" if processes.device.type == "cpu" else str(processes.device)
    plan = ParallelPlan(engine.strategy, config.parallel.offload, engine.precision, processes.world_size)
    tries = smaller(config, plan, engine.micro_batch_size, objective)
    file = shlex.quote(str(run_folder(config.run) / "config.yaml"))
    planned = f"genscale plan --config {file} --gpus {processes.world_size} --gpu {'cpu' if where == 'the host' else 'KIND'}"
    return (f"out of memory on {where}, rank {processes.rank}, at {processes.doing}: {', '.join(facts)}; try "
            f"{', then '.join(tries)}; `{planned}` says what takes how much, and what would fit")


def smaller(config: Config, plan: ParallelPlan, micro_batch_size: int, objective: Objective) -> list[str]:
    """What makes a run need less memory, the cheapest first: nothing that it has already, or that would be refused."""
    model = config.model
    norms = [getattr(model, name, None) for name in ("generator_norm", "discriminator_norm")]
    least = 2 if "batch" in norms and getattr(model, "architecture", "mlp") == "mlp" else 1  # one value has no deviation
    divisors = [size for size in range(least, micro_batch_size) if micro_batch_size % size == 0]
    tries = [f"train.micro_batch_size {divisors[-1]}"] if divisors else []
    recomputable = any(blocks_of(network) for network in objective.networks.values())
    if recomputable and config.parallel.activation_checkpointing != "full":
        tries.append("parallel.activation_checkpointing full")
    sharded = replace(plan, strategy=SHARDS_MOST, offload="none", world_size=max(2, plan.world_size))
    if plan.strategy == SHARDS_MOST:
        tries.append("more processes")
    elif _is_allowed(sharded, config.parallel, config.optimizer.name, objective):
        tries.append(f"parallel.strategy {SHARDS_MOST} on more processes")
    parts = 2 * config.parallel.context
    if not divisors and _can_split(config, objective, parts):  # not even one sequence fits
        tries.append(f"parallel.context {parts} on more processes")
    return [*tries, "a smaller model"]


def _can_split(config: Config, objective: Objective, parts: int) -> bool:
    dealt = [getattr(section, name) for section, name in ((config.model, "heads"), (config.data, "sequence_length"))
             if getattr(section, name, None)]
    return type(objective).split_sequences is not Objective.split_sequences and not any(size % parts for size in dealt)


def _is_allowed(plan: ParallelPlan, settings: ParallelSettings, optimizer: str, objective: Objective) -> bool:
    try:
        check_combination(plan, optimizer)
        check_objective(plan, settings, objective)
    except UserError:
        return False
    return True
