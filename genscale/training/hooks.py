"""All hooks of a run: what happens beside the steps. Each is small, due every so many of them, and keeps its own state."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from genscale.checkpoint.best import check_metric
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.hook import HOOKS, Hook, StepReport
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine
from genscale.settings.config import Config
from genscale.settings.parser import settings_of
from genscale.supervise.run_folder import config_dict, places_of
from genscale.supervise.signals import StopSignal
from genscale.tracking.run_record import RunRecord
from genscale.tracking.writes import Writes
from genscale.training.checkpointing import CompareReplicas, KeepCheckpoints
from genscale.training.evaluating import Evaluate, Sample
from genscale.training.measuring import Count, LogMetrics
from genscale.training.profile import Profile
from genscale.training.trace import Trace

log = logging.getLogger("genscale")


@dataclass
class Cadence:
    """What can be set of every hook, whatever settings of its own it has."""

    every: NonNegativeInt
    """Steps between two calls (0: only after the last step)."""


def configured_hooks(config: Config) -> list[Hook]:
    """The hooks of installed packages that the config chooses, with their settings.

    Raises:
        UserError: none is installed of that name, or its settings are wrong.
    """
    made = []
    for name, given in config.hooks.items():
        key, kind = f"{HOOKS.key}.{name}", HOOKS.load_class(name, Hook, places_of(config))
        own: set[str] = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        rest = dict(given) if isinstance(given, Mapping) else given
        cadence = None if "every" in own or not isinstance(rest, dict) or "every" not in rest else {"every": rest.pop("every")}
        hook = settings_of(kind, rest, key)
        if cadence:
            hook.every = settings_of(Cadence, cadence, key).every
        made.append(hook)
    return made


class RunHooks:
    """The hooks of one run, and the state that they keep in checkpoints. Files and trackers exist on rank 0 only; collectives
    run on every rank.

    Args:
        state: state.json of the checkpoint the run continues from, or an empty dict.
        stop: the signals received so far; one ends an evaluation.
        may_commit: raises where the run folder is another's by now.
        added: the user's, by name. Their states stand together under `hooks` in state.json; the others' beside each other.
        fixed: what checkpoints say of networks that they do not hold, for the run does not change them: under `frozen` of the
            objective's, under `judges` of those that its rewards ask.
    """

    def __init__(self, config: Config, folder: Path, engine: Engine, objective: Objective, data: Data, loader: StepLoader,
                 state: dict[str, Any], stop: StopSignal, may_commit: Callable[[], object] | None,
                 added: Mapping[str, Hook] | None = None, fixed: Mapping[str, Any] | None = None) -> None:
        self.config, self.engine, self.processes, self.loss_unit = config, engine, engine.processes, objective.loss_unit
        self.guards_state: Callable[[], dict[str, Any]] = dict  # the trainer's, once there is one
        validation_set, done, train = data.validation(), state.get("step", 0), config.train
        writes = Writes(log.warning)
        is_main = self.processes.is_main
        self.record = RunRecord(folder, config, config_dict(config), objective.unit, done, writes) if is_main else None
        profile = None
        if is_main and train.profile and done < train.steps:
            profile = Profile(folder / "profile", train.profile, train.steps - done)
        self.trace = Trace(folder, engine, done, writes) if config.run.trace else None
        self.count = Count(train, objective, self.processes, self.record)
        self.evaluate = Evaluate(train, engine, objective, validation_set, self.record, stop,
                                 lambda: self.checkpoints.best_checkpoint())
        self.sample = Sample(train.sample_every, config.run.seed, folder, engine, objective, self.record)
        self.checkpoints = KeepCheckpoints(config, folder, engine, objective, data, loader, self.evaluate, may_commit,
                                           self.state, fixed or {})
        log_metrics = LogMetrics(train.log_every, config.data, self.count, loader, self.processes, self.record,
                                 objective.unit, self.checkpoints.held_up, self.evaluate.score)
        compare = CompareReplicas(engine) if self.processes.world_size > 1 else None
        known = [profile, self.trace, self.count, compare, log_metrics, self.evaluate, self.sample, self.checkpoints]
        self.built_in: list[Hook] = [hook for hook in known if hook is not None]
        self.added = dict(added or {})
        self._load_state(state)
        if unknown := sorted(state.get("hooks", {}).keys() - self.added.keys()):
            log.warning("the checkpoint holds what was kept by hooks that this run has not: %s", ", ".join(unknown))
        if train.checkpoint_best != "loss":  # which all have; what else there is, only an evaluation can tell
            evaluation = self.evaluate.found or self.evaluate.validate(done)
            if evaluation is not None:
                check_metric(train.checkpoint_best, evaluation)

    def list(self) -> list[Hook]:
        """All of them, in the order they run."""
        return sorted([*self.built_in, *self.added.values()], key=lambda hook: hook.order)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of all hooks and of the trainer's guard.

        Raises TypeError where a user's hook keeps what JSON has no form for."""
        state: dict[str, Any] = {"guards": self.guards_state()}
        for hook in self.built_in:
            state |= hook.state()
        if kept := {name: own for name, hook in self.added.items() if (own := hook.state())}:
            try:
                state["hooks"] = json.loads(json.dumps(kept))
            except (TypeError, ValueError) as error:
                raise TypeError(f"what a hook keeps in checkpoints must be JSON: {error} (of {', '.join(kept)})") from None
        return state

    def _load_state(self, state: dict[str, Any]) -> None:
        if state:
            for hook in self.built_in:
                hook.load_state(state)
            for name, own in state.get("hooks", {}).items():
                if name in self.added:
                    self.added[name].load_state(own)

    def rolled_back(self, state: dict[str, Any]) -> None:
        """The run goes on from the checkpoint with this state: what was written of later steps will be written again.
        Collective, and the engine is as it was then."""
        self._load_state(state)
        step = state["step"]
        for hook in self.list():
            hook.rolled_back(step)
        self.make_up(step)

    def make_up(self, step: int) -> None:
        """The evaluation of the step the run goes on from, where a stop left it out: the collapse watch and the best checkpoint
        depend on it."""
        train = self.config.train
        if not self.evaluate.left_out or step >= train.steps:
            return
        self.evaluate.left_out = False
        if self.record is not None:
            self.record.evaluated_anew(step)
        self.evaluate.step(StepReport(step))
        if train.checkpoint_every and step % train.checkpoint_every == 0:
            self.checkpoints.best = self.checkpoints.best_with(step)

    def already_complete(self, step: int) -> None:
        """A complete run is evaluated and sampled once more, for what is shown at its end. Collective."""
        log.info("nothing to do: the run is complete at step %d; raise train.steps to train on", step)
        found = self.evaluate.validate(step)
        if found is not None:
            self.evaluate.found = found
            self.sample.step(StepReport(step, last=True))

    def close(self, failed: bool) -> None:
        """The run is over. A user's hook that fails here is told of and no more: what follows must be closed all the same."""
        self.checkpoints.close(failed)
        for name, hook in self.added.items():
            try:
                hook.close(failed)
            except Exception:
                log.exception("hook %s failed as it was closed", name)
        for hook in self.built_in:
            if hook is not self.checkpoints:
                hook.close(failed)
        if self.record is not None:
            self.record.close(failed, self.loss_unit)
