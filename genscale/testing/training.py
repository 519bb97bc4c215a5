"""Training as a run does it, without a run folder: an objective, an engine, a loader and a trainer, held in the hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.hook import Hook, StepReport, every
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine, Read
from genscale.parallel.pieces import Piece
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine, check_objective
from genscale.settings.config import Config, micro_batch_of
from genscale.training.optimizers import make_optimizer
from genscale.training.trainer import Trainer

State = dict[str, dict[str, dict[str, Tensor]]]
"""Tensors by kind (networks, optimizers, averages), by network, by name."""
MakeTrainer = Callable[[Config, Objective, Engine, StepLoader], Trainer]


class Training:
    """A trainer over an engine of its own, from initial weights or from what another one had come to.

    Every process of a group makes one alike.

    Args:
        objective: its networks stand on the meta device, or have their weights already.
        data: to train on; None for who gives the batches to `trainer.run_phase` himself.
        config: of it the sections train, optimizer, schedule, guards and parallel are read.
        processes: the group; one process where none is given.
        plan: how to spread; one process alone where none is given.
        hooks: of the trainer.
        resume: the `state()` and `place()` of another one.
        trainer: makes another trainer than the plain one, of the config, objective, engine and loader.
        weights: by network, what gives its initial weights; without, `Objective.initial_weights` where it stands on meta.

    Attributes:
        losses: those of the steps of `run`, of an objective of one phase.

    Example:
        >>> from genscale.settings.config import Config, OptimizerSettings, TrainSettings
        >>> from genscale.testing.objectives import ToyGAN, point
        >>> from genscale.testing.toy import ToyData
        >>> from genscale.testing.training import Training
        >>> config = Config(train=TrainSettings(steps=3, global_batch_size=12), optimizer=OptimizerSettings(lr=0.01))
        >>> training = Training(ToyGAN(), ToyData(point), config)
        >>> training.run().step, sorted(training.state()["networks"])
        (3, ['discriminator', 'generator'])
    """

    def __init__(self, objective: Objective, data: Data | None, config: Config, *, processes: Processes | None = None,
                 plan: ParallelPlan | None = None, hooks: Sequence[Hook] = (), resume: tuple[State, Any] | None = None,
                 trainer: MakeTrainer | None = None, weights: Mapping[str, Read] | None = None) -> None:
        train = config.train
        self.objective, self.processes = objective, processes or Processes()
        plan = plan or ParallelPlan("single", "none", "fp32", 1)
        micro = micro_batch_of(train) or train.global_batch_size // self.processes.data_world
        accumulation = train.global_batch_size // self.processes.data_world // micro
        check_objective(plan, config.parallel, objective)
        objective.split_sequences(self.processes.part)
        saved = resume[0] if resume else None
        self.engine = build_engine(plan, self.processes, config.parallel, plan.precision, train.clip, micro, accumulation)
        if saved:
            weights = {name: state.__getitem__ for name, state in saved["networks"].items()}
        elif weights is None and any(p.is_meta for network in objective.networks.values() for p in network.parameters()):
            weights = {name: objective.initial_weights(name) for name in objective.networks}
        averaged = objective.averaged if train.ema_half_life else ()
        self.engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer, plan.precision),
                            weights, averaged, objective.frozen)
        if saved:
            for name, state in saved["optimizers"].items():
                self.engine.load_optimizer_state(name, state, state.__getitem__)
            for name, state in saved["averages"].items():
                self.engine.load_average_state(name, state, state.__getitem__)
        loader: Any = None if data is None else StepLoader(
            data, global_batch_size=train.global_batch_size, micro_batch_size=micro, rank=self.processes.data_rank,
            world_size=self.processes.data_world, workers=0, prefetch_steps=2, state=resume[1] if resume else None)
        self.loader, self.losses = loader, list[float]()
        self.trainer = trainer(config, objective, self.engine, loader) if trainer else Trainer(
            config, objective, self.engine, loader, hooks, last_good=lambda: "none")

    def _note(self, report: StepReport) -> None:
        if "loss" in report.metrics:
            self.losses.append(report.metrics["loss"])

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.loader is not None:
            self.loader.close()

    def run(self, first: int = 1) -> StepReport | None:
        """Train from a step to the last one, and close the loader."""
        self.trainer.hooks = [*self.trainer.hooks, every(1, self._note)]
        with self:
            return self.trainer.run(first)

    def state(self) -> State:
        """All tensors, whole, in every process."""
        names = self.engine.optimizers
        return {"networks": {name: {key: value.clone() for key, value in self.engine.network_state(name)} for name in names},
                "optimizers": {name: self._whole(self.engine.optimizer_pieces(name)) for name in names},
                "averages": {name: self._whole(self.engine.average_pieces(name)) for name in self.engine.averages}}

    def place(self) -> Any:
        """The place in the data; None without data."""
        if self.loader is None:
            return None
        return merge_states(self.processes.gather(self.loader.state()), self.trainer.config.train.global_batch_size)

    def _whole(self, pieces: list[Piece]) -> dict[str, Tensor]:
        return put_together(piece for of_process in self.processes.gather(pieces) for piece in of_process)


def put_together(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """The tensors that the pieces of all processes make; -1 where there is none."""
    made: dict[str, Tensor] = {}
    for piece in pieces:
        tensor = made.setdefault(piece.name, torch.full(piece.shape, -1, dtype=piece.values.dtype))
        tensor.view(-1)[piece.first:piece.first + piece.values.numel()] = piece.values.detach().reshape(-1)
    return made


def same(first: Any, second: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
