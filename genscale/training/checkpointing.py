"""The hook that keeps the run: a checkpoint with the state of all hooks, and which of them is the best."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from genscale.checkpoint.best import best_of, better_of
from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.checkpoint.provenance import position_in_words, provenance
from genscale.checkpoint.saving import Contents, Saver
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.hook import Hook, Order, StepReport
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine
from genscale.rewards.registry import INSTALLED as REWARDS
from genscale.settings.config import Config
from genscale.supervise.run_folder import config_yaml
from genscale.tracking.peaks import device_name
from genscale.training.evaluating import Evaluate
from genscale.training.replicas import compare_replicas

log = logging.getLogger("genscale")


class CompareReplicas(Hook):
    """Compares the processes after the first step of this life, lest a run train for nothing until its first checkpoint."""

    name, order, settled = "comparing the processes", Order.COUNT, False

    def __init__(self, engine: Engine) -> None:
        self.engine, self._compared = engine, False

    def step(self, report: StepReport) -> None:
        """Collective. Raises UserError as `compare_replicas` does."""
        if not self._compared:
            self._compared = True
            compare_replicas(self.engine)


def devices(device: torch.device) -> dict[str, Any]:
    """What a run was trained on so far, and what it took there: what its plan is held against."""
    said: dict[str, Any] = {"device": device_name(device), "processes_per_node": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    if device.type == "cuda":
        said["peak_memory_bytes"] = torch.cuda.max_memory_reserved(device)
    return said


class KeepCheckpoints(Hook):
    """Copies the full state, each rank its part, and writes it in the background. A failed write is a warning, except after the
    last step.

    The best checkpoint is the one with the best `train.checkpoint_best` among those evaluated at their own step.

    Args:
        evaluate: the hook whose metrics choose the best.
        may_commit: raises where the run folder is another's by now.
        state_of_hooks: what all of them keep, this one too, and the trainer.
        fixed: what a checkpoint says of networks that it does not hold, by the key of state.json.

    Attributes:
        best: what state.json says of the best checkpoint so far.
    """

    name, order, sound = "checkpoint", Order.CHECKPOINT, True

    def __init__(self, config: Config, folder: Path, engine: Engine, objective: Objective, data: Data, loader: StepLoader,
                 evaluate: Evaluate, may_commit: Callable[[], object] | None,
                 state_of_hooks: Callable[[], dict[str, Any]], fixed: Mapping[str, Any]) -> None:
        train = config.train
        self.config, self.every = config, train.checkpoint_every
        self.by_clock = self._minutes_are_up if train.checkpoint_minutes else None
        self.engine, self.processes, self.objective, self.data, self.loader = engine, engine.processes, objective, data, loader
        self.evaluate, self.state_of_hooks, self.fixed = evaluate, state_of_hooks, fixed
        self.best: dict[str, Any] | None = None
        self.saver = Saver(folder / "checkpoints", self.processes, train.checkpoint_keep, train.checkpoint_keep_every,
                           may_commit)
        self._best_in_flight: dict[str, Any] | None = None
        self._hold_up: float | None = None
        self._saved_at = time.monotonic()

    def load_state(self, state: dict[str, Any]) -> None:
        self.best = best_of(state, self.config.train.checkpoint_best)

    def step(self, report: StepReport) -> None:
        """Collective. Raises UserError where the last save of a run has failed."""
        started = time.perf_counter()
        self.settle_save()
        compare_replicas(self.engine)
        best = self.best_with(report.step)
        pieces = {}
        for name in self.engine.optimizers:
            pieces[f"networks/{name}"] = self.engine.network_pieces(name)
            pieces[f"optimizers/{name}"] = self.engine.optimizer_pieces(name)
        for name in self.engine.averages:
            pieces[f"averages/{name}"] = self.engine.average_pieces(name)
        data = merge_states(self.processes.gather(self.loader.state()), self.data.lane_count)
        state = {"step": report.step, **self.state_of_hooks(), "best": best, "accumulation": self.engine.accumulation,
                 "scalers": {name: self.engine.scaler_state(name) for name in self.engine.optimizers},
                 "data": data, "plan": self.data.plan(), "world_size": self.processes.world_size}
        state |= {key: said for key, said in self.fixed.items() if said}
        position = position_in_words(data["batches"] * self.config.train.global_batch_size, self.data.samples_of_epoch())
        about = {**provenance(self.processes.world_size, self.engine.strategy, position, self.config),
                 **devices(self.processes.device)}
        if self.objective.rewards is not None and (origins := self.objective.rewards.origins()):
            about.setdefault("plugins", {})[REWARDS.group] = origins
        self.saver.start(pieces, Contents(report.step, state, config_yaml(self.config), about,
                                          best_step=best["step"] if best else None, last=report.last))
        self._best_in_flight = best
        self._hold_up, self._saved_at = time.perf_counter() - started, time.monotonic()
        if report.last:
            self.settle_save()

    def settle_save(self) -> bool:
        """Wait for the save in flight; False where it has failed. Collective.

        Raises UserError where it was the last one.
        """
        came_to_be = self.saver.settle()
        if came_to_be:
            self.best = self._best_in_flight
        return came_to_be is not False

    def best_with(self, step: int) -> dict[str, Any] | None:
        """The best checkpoint so far, if there is now one of this step."""
        if self.evaluate.at_step != step:
            return self.best
        metric = self.config.train.checkpoint_best
        return better_of(self.best, step, metric, self.evaluate.found, metric in self.objective.higher_is_better)

    def best_checkpoint(self) -> Checkpoint | None:
        """The best checkpoint, if it is there and whole. Collective."""
        self.settle_save()
        return self.processes.main_does(self._find_best)

    def _find_best(self) -> Checkpoint | None:
        if self.best is None:
            return None
        checkpoint = Checkpoint(self.saver.folder / f"step-{self.best['step']:08d}")
        if problem := checkpoint.problem():
            log.warning("the best checkpoint %s is damaged (%s)", checkpoint.path, problem)
            return None
        return checkpoint

    def last_good(self) -> str:
        """Where a run that went wrong can be taken up again. Collective."""
        self.settle_save()
        found = self.processes.main_does(lambda: list_checkpoints(self.saver.folder))
        return str(found[-1].path) if found else "none"

    def held_up(self) -> float | None:
        """Seconds that the last checkpoint has held up the steps, once."""
        seconds, self._hold_up = self._hold_up, None
        return seconds

    def close(self, failed: bool) -> None:
        self.saver.finish()

    def _minutes_are_up(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self.config.train.checkpoint_minutes
