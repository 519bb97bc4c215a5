"""What a run is made of before its first step: checked settings, objective, networks under the strategy, and loader.

The audit, `genscale check-family` and the check before a job is submitted make the same, without a run around it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.restoring import load_beside_weights
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import times_read
from genscale.data.source_file import is_url
from genscale.errors import UserError, nearest_divisors
from genscale.families import family
from genscale.interop.source_runs import give_source
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine, Read, named_state
from genscale.parallel.materialise import begin_alike
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, check_objective
from genscale.settings.config import Config, DataSettings, GuardSettings, OptimizerSettings, TrainSettings, micro_batch_of
from genscale.settings.mistakes import check_not_masked
from genscale.training.collapse import check_collapse
from genscale.training.optimizers import make_optimizer
from genscale.training.update_guard import check_guards

log = logging.getLogger("genscale")


def check_settings(config: Config) -> None:
    """What can be told of a config by itself. Raises UserError."""
    check_collapse(config.train)
    check_guards(config.guards, config.train)
    check_patience(config.guards, config.data)
    check_not_masked(config.data, "data.")


def check_patience(guards: GuardSettings, data: DataSettings) -> None:
    """Raises UserError where the watchdog would take a run for hanging that waits for a web server."""
    minutes, limit = getattr(data, "retry_minutes", 0.0), guards.hang_minutes
    if 0 < limit <= minutes and _is_of_the_web(dataclasses.asdict(cast(Any, data))):
        raise UserError(f"data.retry_minutes: {minutes:g} is not below guards.hang_minutes {limit:g}, so that a run that waits "
                        f"for its server would be taken for one that hangs; set data.retry_minutes to {limit / 2:g}, or "
                        f"guards.hang_minutes to {2 * minutes:g}")


def _is_of_the_web(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_of_the_web, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_of_the_web, value))
    return isinstance(value, str) and is_url(value)


def derive_accumulation(train: TrainSettings, world_size: int, context: int = 1) -> tuple[int, int]:
    """(micro-batch size, micro-batches in a step) of each process. Raises UserError naming the nearest sizes that divide.

    Args:
        context: so many processes read the same samples; it divides `world_size`.
    """
    batch, readers = train.global_batch_size, world_size // context
    among = f"{readers} processes" if context == 1 else f"{readers} groups of {context} processes"
    if batch % readers:
        below, above = batch // readers * readers, (batch // readers + 1) * readers
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch_size: {batch} does not divide by {among}; nearest "
                        f"values that do: {near}")
    share = batch // readers
    micro = micro_batch_of(train) or share
    if share % micro:
        unit = micro * readers
        nearest_batch = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
        raise UserError(f"train.micro_batch_size: {micro} x {among} does not divide "
                        f"train.global_batch_size {batch}; nearest "
                        f"micro-batch sizes that do: {nearest_divisors(share, micro)}; nearest global batch sizes: "
                        f"{' or '.join(map(str, nearest_batch))}")
    return micro, share // micro


def open_objective(config: Config, processes: Processes, plan: ParallelPlan, data: Data) -> Objective:
    """What the run minimises, checked against its data and the way it is spread. Raises UserError."""
    processes.main_does(lambda: data.check(config.train.global_batch_size))
    objective = processes.all_do(lambda: family(config.model.family).build_objective(config, data))
    give_source(objective, config)
    check_objective(plan, config.parallel, objective)
    objective.split_sequences(processes.part)
    check_learning_rates(config.optimizer, config.model.family, objective)
    return objective


def check_learning_rates(settings: OptimizerSettings, family_name: str, objective: Objective) -> None:
    """Raises UserError where optimizer.lr_of names a network that the objective has not."""
    for name in settings.lr_of:
        if name in objective.frozen:
            raise UserError(f"optimizer.lr_of: {name} is frozen in family {family_name}: no optimizer steps it; leave it out")
        if name not in objective.networks:
            raise UserError(f"optimizer.lr_of: {name} is no network of family {family_name}; its networks are "
                            f"{', '.join(objective.networks)}")


def check_same_networks(checkpoint: Checkpoint, objective: Objective) -> None:
    """Raises UserError where the checkpoint holds a network of other shapes."""
    for name, network in objective.networks.items():
        if name not in objective.frozen:
            _check_same_network(checkpoint, name, network)


def _check_same_network(checkpoint: Checkpoint, name: str, network: nn.Module) -> None:
    stored = checkpoint.tensors("networks", name).shapes()
    wanted = {key: tuple(value.shape) for key, value in named_state(network)}
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise UserError(f"run.resume: the checkpoint {checkpoint.path} holds another model: {name}.{key} is "
                            f"{stored.get(key, 'absent')} "
                            f"there and {wanted.get(key, 'absent')} here; begin a new run with another --run.name")


def prepare(engine: Engine, objective: Objective, optimizer: OptimizerSettings, averaged: Sequence[str],
            checkpoint: Checkpoint | None, pretrained: Read | None, frozen: Mapping[str, Read] | None = None) -> None:
    """Networks with the checkpoint's weights, or those to start from, under the strategy; then the rest of the checkpoint.

    Args:
        averaged: the networks to keep an average of.
        pretrained: reads the weights to start from; None: they are drawn.
        frozen: reads the weights of the frozen networks; None: they begin as the others do.
    """
    weights: dict[str, Read] = {}
    for name in objective.networks:
        if name in objective.frozen:
            weights[name] = frozen[name] if frozen is not None else pretrained or objective.initial_weights(name)
        elif checkpoint is not None:
            weights[name] = checkpoint.tensors("networks", name)
        else:
            weights[name] = pretrained or objective.initial_weights(name)
    for name, network in objective.networks.items():
        begin_alike(network, engine.processes, filled=checkpoint is not None and name not in objective.frozen)
    engine.prepare(objective.networks, lambda module: make_optimizer(module, optimizer, engine.precision), weights, averaged,
                   objective.frozen)
    objective.generating = engine.generating  # type: ignore[method-assign]
    if checkpoint is not None:
        load_beside_weights(engine, checkpoint)


def averaged_networks(half_life: float, family_name: str, objective: Objective) -> tuple[str, ...]:
    """Names of the networks to keep an average of, where one forgets half in `half_life` samples (0: none). Raises UserError
    where the family has none."""
    if not half_life:
        return ()
    if not objective.averaged:
        raise UserError(f"train.ema_half_life: {half_life:g}, but family {family_name} averages none of its networks; nearest "
                        "allowed: 0")
    return tuple(objective.averaged)


def shared_lanes(data: Data, settings: DataSettings, world_size: int) -> str | None:
    """What to say where several processes must each read the same lanes from their start; None where nothing is read twice."""
    times = times_read(data.lane_count, world_size)
    if times == 1 or data.cursor_at(1) is not None or getattr(settings, "cache", "") is not None:
        return None
    fits = -(-data.lane_count // world_size) * world_size
    return (f"data.lanes: {data.lane_count}, of which each is read by {times} of the {world_size} processes, so that all is "
            f"read and tokenised {times} times; a new run may set data.lanes {fits} (a multiple of the processes)")


def open_loader(data: Data, settings: DataSettings, global_batch_size: int, micro_batch_size: int, processes: Processes,
                state: dict[str, Any] | None = None) -> StepLoader:
    """This process's micro-batches, from the start or from where a checkpoint's `state` says."""
    state = state or {}
    if (shared := shared_lanes(data, settings, processes.data_world)) and processes.is_main:
        log.warning("%s", shared)
    return StepLoader(data, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size,
                      rank=processes.data_rank, world_size=processes.data_world, workers=settings.workers,
                      prefetch_steps=settings.prefetch_steps, state=state.get("data"),
                      pin_memory=processes.device.type == "cuda", left_out=(state.get("guards") or {}).get("batches", ()))
