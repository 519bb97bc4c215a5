"""The step that runs, on tensors without values: the trainer's own body under the engine that the run would have."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from genscale.models.device_kind import Kind, planned_on
from genscale.models.memory_format import set_memory_format
from genscale.models.network_parts import blocks_of
from genscale.objectives.base import Blueprint, Objective, Phase
from genscale.parallel.engine import Engine
from genscale.parallel.materialise import materialise, without_values
from genscale.parallel.planned import PlannedProcesses, fake_group, planned_engine
from genscale.parallel.planned_zero import LIVE, PlannedZero
from genscale.parallel.strategies import ParallelPlan
from genscale.parallel.torch_optimizers import state_tensors
from genscale.planning.account import Part
from genscale.planning.cuda_dispatch import as_on_cuda
from genscale.planning.recorder import Recorder
from genscale.rng import AHEAD, AHEAD_STEPS, Draws
from genscale.settings.config import Config
from genscale.training.optimizers import make_optimizer
from genscale.training.setup import averaged_networks
from genscale.training.trainer import Trainer

HOST = "host memory"
"""The category of what is not on the device."""
TRACED = 2
"""Micro-batches of a step: the first, and one that is computed beside gradients and reduces them."""


@dataclass(frozen=True)
class Spread:
    """How a step is divided.

    Attributes:
        micro_batch_size, accumulation: of each process.
        parameters: of all networks, at their full depth.
        compiled: whether the run's blocks will be.
    """

    plan: ParallelPlan
    micro_batch_size: int
    accumulation: int
    parameters: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Traced:
    """A step that was traced.

    Attributes:
        recorder: what it did.
        first: the event that the step begins with; those before it make what is there between steps.
        at_rest: bytes of weights, averages and optimizer state of this process, as its engine counts them.
        updates: in a step, by phase; of a phase that comes every n steps, an n-th.
        micro_batches: how often the first that was traced stands for one.
        most_gathered: bytes of gathered weights that there are at most, where the trace holds them all.
    """

    recorder: Recorder
    first: int
    at_rest: int
    updates: dict[str, float]
    micro_batches: int
    most_gathered: int | None = None

    def times_of(self, phase: str, micro_batch: int, part: Part) -> float:
        """How often a step does what was recorded once."""
        if part == "average":
            return 1.0
        return self.updates[phase] * (self.micro_batches if micro_batch == 0 and part != "optimizer" else 1)


class DrawsByShape:
    """Makes draws of random numbers that nobody has drawn; where few are wanted, they take the room of some steps' (see
    `genscale.rng.DrawsAhead`)."""

    def __init__(self) -> None:
        self._ahead: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, seed: int, scope: str, step: int, samples: Tensor, device: str | torch.device = "cpu") -> Draws:
        return _ByShape(self._ahead, seed, scope, step, samples, device)


class _ByShape(Draws):
    rehearsal = property(lambda _: True, lambda _, wanted: None)  # nothing is made for anybody

    def __init__(self, ahead: dict[tuple[object, ...], Tensor], *address: Any) -> None:
        super().__init__(*address)
        self._ahead = ahead

    def keys(self, stream: str) -> Tensor:
        return torch.zeros(len(self.samples), dtype=torch.int64, device=self.device)

    def _draw(self, kind: str, stream: str, shape: tuple[int, ...]) -> Tensor:
        wanted = (len(self.samples), *shape)
        steps = min(AHEAD // max(1, math.prod(wanted)), AHEAD_STEPS)
        if steps >= 2:
            drawn = torch.zeros(steps, *wanted, device=self.device)
            self._ahead.setdefault((self.scope, kind, stream, shape, id(self.samples)), drawn)
        return torch.zeros(wanted, device=self.device)


def trace_step(config: Config, blueprint: Blueprint, spread: Spread, kind: Kind) -> Traced:
    """One step of rank 0, with its optimizer's state there from the start.

    Args:
        config: with nothing left to the launcher or the device.
        kind: of device, which decides on kernels and on how much is computed at once.
    """
    recorder, plan = Recorder(), spread.plan
    group = fake_group(plan.world_size) if plan.needs_group or plan.world_size > 1 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(group)
        processes = PlannedProcesses(plan.world_size, lambda doing: noted(recorder, doing), lambda: _waiting(recorder))
        processes.split_sequences(plan.context)
        blueprint.objective.split_sequences(processes.part)
        engine = planned_engine(plan, processes, config.parallel, config.train.precision, config.train.clip,
                                spread.micro_batch_size, spread.accumulation)
        if isinstance(engine, PlannedZero):
            engine.gives_back = spread.parameters > LIVE
        for network in blueprint.objective.networks.values():
            without_values(network)
            if not engine.whole_weights:
                set_memory_format(network, torch.contiguous_format)  # as the engine will, while it can be done
        stack.enter_context(planned_on(kind, lambda tensor: recorder.mark([tensor], HOST), spread.compiled))
        if kind == "gpu":
            stack.enter_context(as_on_cuda())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder.recording())
        _prepare(engine, blueprint.objective, config)
        trainer = Trainer(config, blueprint.objective, engine, loader=None, hooks=[],  # type: ignore[arg-type]
                          last_good=lambda: "none")
        trainer.make_draws = DrawsByShape()
        traced = min(spread.accumulation, TRACED)
        batches = [example(blueprint, spread.micro_batch_size) for _ in range(traced)]
        first = run_step(recorder, engine, trainer, batches)
        at_rest = engine.bytes_at_rest()
    updates = {phase.name: phase.repeats / phase.every for phase in blueprint.objective.phases}
    return Traced(recorder, first, at_rest, updates, spread.accumulation - traced + 1, getattr(engine, "most_gathered", None))


def run_step(recorder: Recorder, engine: Engine, trainer: Trainer, batches: list[dict[str, Tensor]]) -> int:
    """Every phase once, then the averages; the number of the event that the step begins with."""
    objective = trainer.objective
    _begin_optimizers(engine)
    mark_what_rests(recorder, engine)
    gc.collect()
    first = len(recorder.events)
    step = math.lcm(*(phase.every for phase in objective.phases))
    for phase in objective.phases:
        _run_phase(recorder, engine, trainer, phase, step, batches)
    recorder.at(phase=objective.phases[-1].name, part="average", region="", layer="")
    trainer.update_averages(step)
    recorder.at(phase="")
    return first


def _run_phase(recorder: Recorder, engine: Engine, trainer: Trainer, phase: Phase, step: int,
               batches: list[dict[str, Tensor]]) -> None:
    network = engine.modules[phase.network]
    recorder.watch(network, blocks_of(network))
    recorder.at(phase=phase.name, micro_batch=-1, part="forward", region="", layer="")
    trainer.run_phase(phase, step, batches, lambda: 1)
    recorder.watch(nn.Module(), [])


def noted(recorder: Recorder, doing: str) -> None:
    """What the trainer tells the watchdog it is at."""
    recorder.keep_gradients()
    if doing.endswith(", forward"):
        recorder.at(micro_batch=recorder.moment.micro_batch + 1, part="forward", region="", layer="")
    elif doing.endswith(", backward"):
        recorder.at(part="backward")
    elif doing.endswith(", step"):
        recorder.at(part="optimizer", region="", layer="")


@contextlib.contextmanager
def _waiting(recorder: Recorder) -> Iterator[None]:
    recorder.waits = True
    try:
        yield
    finally:
        recorder.waits = False


def _prepare(engine: Engine, objective: Objective, config: Config) -> None:
    for network in objective.networks.values():
        materialise(network, engine.processes.device)
    averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
    engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer, engine.precision), None,
                   averaged, objective.frozen)
    objective.generating = engine.generating  # type: ignore[method-assign]


def _begin_optimizers(engine: Engine) -> None:
    """Make the state that the first step makes, by a step without gradients."""
    for optimizer in engine.optimizers.values():
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None


def mark_what_rests(recorder: Recorder, engine: Engine) -> None:
    """Say of what there is between steps what it is for."""
    for module in engine.modules.values():
        recorder.mark([*module.parameters(), *module.buffers()], "weights")
    for optimizer in engine.optimizers.values():
        recorder.mark(state_tensors(optimizer), "optimizer state")
    for average in engine.averages.values():
        recorder.mark(average.held(), "averages")
    recorder.mark([tensor for network in engine.networks.values() for tensor in getattr(network, "buckets", ())], "gradients")
    if isinstance(engine, PlannedZero):
        recorder.mark([tensor for flats in (*engine.flats.values(), *engine.kept.values()) for tensor in flats], "weights")
        kept = (*engine.whole_gradients.values(), *engine.parts.values())
        recorder.mark([tensor for tensors in kept for tensor in tensors], "gradients")
        recorder.mark(list(engine.buckets.values()), "exchange of gradients")
        recorder.mark(engine.gathered(), "gathered weights")
        recorder.mark(engine.on_host(), HOST)


def example(blueprint: Blueprint, size: int) -> dict[str, Tensor]:
    """A batch of so many samples, without values."""
    batch = {name: torch.zeros((size, *value.shape), dtype=value.dtype) for name, value in blueprint.sample.items()}
    return {**batch, "sample": torch.zeros(size, dtype=torch.int64)}


def without_compiler(config: Config) -> Config:
    """What a plan leaves out: compiled blocks, and products in fp8, are planned as they are without."""
    precision = {"auto": "bf16", "fp8": "bf16"}.get(config.train.precision, config.train.precision)
    train: Any = replace(config.train, precision=precision)  # type: ignore[arg-type]
    return replace(config, parallel=replace(config.parallel, compile=False), train=train)
