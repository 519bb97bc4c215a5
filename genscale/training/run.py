"""A run from its config to its end: what is built, in which order, and what is checked before the first step."""

from __future__ import annotations

import logging
import platform
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.frozen_networks import keep_frozen
from genscale.checkpoint.restoring import load_beside_weights
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.errors import UserError, nearest_divisors
from genscale.families import FAMILIES, family
from genscale.hook import Hook, hooks_by_name
from genscale.interop.source_runs import give_source
from genscale.interop.starting import keep_for_export, weights_from
from genscale.objectives.base import Objective
from genscale.parallel.determinism import deterministic
from genscale.parallel.engine import Engine, Read, named_state
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.launcher import follow_launcher, launcher_is_gone
from genscale.parallel.materialise import begin_alike
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine, check_objective, plan_parallel
from genscale.settings.config import Config
from genscale.settings.mistakes import check_not_masked
from genscale.supervise.ending import before_the_run
from genscale.supervise.run_folder import (
    check_batch_memory,
    check_free_space,
    check_host_memory,
    check_may_continue,
    check_same_accumulation,
    config_yaml,
    find_resume_point,
    open_data,
    run_folder,
    set_later_checkpoints_aside,
)
from genscale.supervise.signals import StopSignal
from genscale.supervise.supervision import Supervision, group_timeout_minutes
from genscale.supervise.watchdog import check_patience
from genscale.tracking.metrics_file import read_metrics
from genscale.training.collapse import Collapsed, check_collapse
from genscale.training.hooks import RunHooks
from genscale.training.optimizers import make_optimizer
from genscale.training.rollback import GoBack
from genscale.training.schedules import never_reached
from genscale.training.trainer import Trainer
from genscale.training.update_guard import check_guards
from genscale.writing import write_whole

log = logging.getLogger("genscale")


@dataclass(frozen=True)
class RunResult:
    """How a run ended: what `genscale.train` returns, on every process.

    Attributes:
        folder: of the run.
        step: the last step done.
        evaluation: metrics of the last evaluation.
        preview: the last generated sample: text, or the file of a picture.
        stopped_by: the signal that ended it before `train.steps`, if one did.
        is_main: this process is rank 0, which does the talking.
        launcher_lost: a launcher was killed, perhaps that of another machine's processes: the others would wait for it.
    """

    folder: Path
    step: int
    evaluation: dict[str, float]
    preview: str | Path
    stopped_by: signal.Signals | None
    is_main: bool
    launcher_lost: bool = False

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Everything that the run has logged so far, read from its metrics.jsonl: a dict a line, `step` among its keys; what
        evaluations found is called `validation_<name>`. `pandas.DataFrame(run.metrics)` makes a table of it."""
        return read_metrics(self.folder / "metrics.jsonl")


def train(config: Config, stop: StopSignal | None = None, hooks: Sequence[Hook] = ()) -> RunResult:
    """Train as the config says.

    Args:
        stop: the signals received so far, where somebody listens for them already.
        hooks: what else to do every so many steps.

    Raises:
        UserError: anything the user can mend, on every rank, before the first step; and a run that has gone wrong.
    """
    named = hooks_by_name(hooks)
    with deterministic(config.run.deterministic), stop or StopSignal() as listening:
        return _start(config, listening, named)


def _start(config: Config, stop: StopSignal, hooks: Mapping[str, Hook]) -> RunResult:
    with before_the_run():
        check_settings(config)
        plan = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
        config = plan.settled(config)
        shape = derive_accumulation(config, plan.world_size)
        folder = run_folder(config)
        check_batch_memory(config, shape[0])
    clear_launch_environment()
    with before_the_run():
        processes = Processes(plan.needs_group, group_timeout_minutes(config.guards.hang_minutes))
    try:
        with Supervision(config, folder, processes, stop) as supervision:
            return _train(config, processes, plan, shape, folder, supervision, hooks)
    finally:
        processes.close()


def check_settings(config: Config) -> None:
    """What can be told of a config by itself. Raises UserError."""
    check_collapse(config.train)
    check_guards(config)
    check_patience(config)
    check_not_masked(config.data, "data.")


def derive_accumulation(config: Config, world_size: int) -> tuple[int, int]:
    """(micro-batch size, micro-batches in a step) of each process. Raises UserError naming the nearest sizes that divide."""
    train = config.train
    batch = train.global_batch_size
    if batch % world_size:
        below, above = batch // world_size * world_size, (batch // world_size + 1) * world_size
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.global_batch_size: {batch} does not divide by {world_size} processes; nearest "
                        f"values that do: {near}")
    share = batch // world_size
    micro = train.micro_batch_size or share
    if share % micro:
        unit = micro * world_size
        nearest_batch = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
        raise UserError(f"train.micro_batch_size: {micro} x {world_size} processes does not divide "
                        f"train.global_batch_size {batch}; nearest "
                        f"micro-batch sizes that do: {nearest_divisors(share, micro)}; nearest global batch sizes: "
                        f"{' or '.join(map(str, nearest_batch))}")
    return micro, share // micro


def _train(config: Config, processes: Processes, plan: ParallelPlan, shape: tuple[int, int], folder: Path,
           supervision: Supervision, added: Mapping[str, Hook] | None = None) -> RunResult:
    micro_batch_size, accumulation = shape
    config, data = processes.all_do(partial(open_data, config, folder))
    loader = objective = None
    try:
        objective = open_objective(config, processes, plan, data)
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in objective.networks.items()}
        frozen_parameters = sum(sizes.pop(name) for name in objective.frozen)
        parameters = sum(sizes.values())
        averages = sum(sizes[name] for name in averaged_networks(config, objective))
        hosts = processes.gather(platform.node())
        here = hosts.count(hosts[0])
        copies = plan.copies_of_weights(here) if processes.device.type == "cpu" else 0
        processes.main_does(lambda: check_host_memory(parameters, averages, here / len(hosts), copies,
                                                      frozen_parameters))
        processes.main_does(lambda: check_free_space(folder, parameters, averages, config.train, log.warning,
                                                     frozen_parameters))
        checkpoint = _resume_point(config, processes, folder, data, objective, accumulation)
        engine = build_engine(plan, processes, config.parallel, config.train.precision, config.train.clip,
                              micro_batch_size, accumulation)
        pretrained = None if checkpoint else processes.all_do(lambda: weights_from(config))
        frozen, reads = keep_frozen(objective, folder, checkpoint, processes)
        prepare(config, engine, objective, checkpoint, pretrained, reads)
        state = checkpoint.state() if checkpoint else {}
        loader = open_loader(config, data, processes, micro_batch_size, state)
        processes.main_does(lambda: _write_what_it_is(config, folder, objective, pretrained is not None))
        if processes.is_main:
            for line in never_reached(config):
                log.warning("%s", line)
            if pretrained is not None:
                log.info("starting from the weights of %s", config.model.from_)
            kind = processes.device.type if processes.device.type == "cpu" else torch.cuda.get_device_name(processes.device)
            beside = f" and {frozen_parameters:,} frozen ones" if frozen_parameters else ""
            log.info("%s: %s parameters%s, %s, %d process%s on %s, %s, accumulation %d", folder, f"{parameters:,}", beside,
                     plan.strategy,
                     processes.world_size, "es" if processes.world_size > 1 else "", kind, config.train.precision, accumulation)
        if objective.rewards is not None:
            objective.rewards.open(folder, processes.rank, state.get("step", 0), processes.note)
        hooks = RunHooks(config, folder, engine, objective, data, loader, state, supervision.stop,
                         supervision.owner.check if supervision.owner else None, added, frozen)
        return _loop(config, folder, engine, objective, loader, hooks, checkpoint, supervision)
    except BaseException as error:
        supervision.failed(error)
        raise
    finally:
        if loader is not None:
            loader.close()
        if objective is not None and objective.rewards is not None:
            objective.rewards.close()
        data.close()


def _write_what_it_is(config: Config, folder: Path, objective: Objective, pretrained: bool) -> None:
    """What is read of a run besides its checkpoints. Raises UserError where it cannot be written."""
    try:
        write_whole(folder / "config.yaml", config_yaml(config))
        objective.save_assets(folder)
        if pretrained:
            keep_for_export(config, folder)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder} ({error.strerror}); free some space, or set --run.dir to another "
                        "folder") from None


def open_objective(config: Config, processes: Processes, plan: ParallelPlan, data: Data) -> Objective:
    """What the run minimises, checked against its data and the way it is spread. Raises UserError."""
    processes.main_does(lambda: data.check(config.train.global_batch_size))
    objective = processes.all_do(lambda: family(config.model.family).build_objective(config, data))
    give_source(objective, config)
    check_objective(plan, config.parallel, objective)
    check_learning_rates(config, objective)
    return objective


def check_learning_rates(config: Config, objective: Objective) -> None:
    """Raises UserError where optimizer.lr_of names a network that the objective has not."""
    for name in config.optimizer.lr_of:
        if name in objective.frozen:
            raise UserError(f"optimizer.lr_of: {name} is frozen in family {config.model.family}: no optimizer steps it; leave "
                            "it out")
        if name not in objective.networks:
            raise UserError(f"optimizer.lr_of: {name} is no network of family {config.model.family}; its networks are "
                            f"{', '.join(objective.networks)}")


def _loop(config: Config, folder: Path, engine: Engine, objective: Objective, loader: StepLoader, hooks: RunHooks,
          checkpoint: Checkpoint | None, supervision: Supervision) -> RunResult:
    outcome, state = "failed", checkpoint.state() if checkpoint else {}
    done = state.get("step", 0)
    try:
        trainer = Trainer(config, objective, engine, loader, [supervision.hook(), *hooks.list()], hooks.checkpoints.last_good,
                          supervision.stop, state.get("guards"), GoBack(folder, engine, loader, hooks, checkpoint))
        hooks.guards_state = trainer.state
        if hooks.trace is not None:
            trainer.make_draws = hooks.trace.draws
        supervision.loop_begins(done)
        follow_launcher()
        hooks.make_up(done)
        goes_on = hooks.evaluate.collapse is None and supervision.stop.agreed is None
        report = trainer.run(done + 1) if goes_on else None
        if report is None and goes_on:
            hooks.already_complete(done)
        if hooks.evaluate.collapse is not None:
            raise Collapsed(hooks.evaluate.collapse)
        stopped_by = supervision.stop.agreed
        outcome = "stopped" if stopped_by else "complete"
        supervision.ended(stopped_by)  # before what takes time and may be cut short: trackers, and the loss curve
        return RunResult(folder, report.step if report else done, hooks.evaluate.found, hooks.sample.preview, stopped_by,
                         engine.processes.is_main, stopped_by is not None and _launcher_lost(engine.processes))
    except BaseException as error:
        supervision.failed(error)
        raise
    finally:
        supervision.loop_ends()
        hooks.close(failed=outcome == "failed")


def _launcher_lost(processes: Processes) -> bool:
    """Whether that of any process is; where another process is gone by now, as far as this one can tell. Collective."""
    gone = launcher_is_gone()
    try:
        return any(processes.gather(gone))
    except RuntimeError:
        return gone


def _resume_point(config: Config, processes: Processes, folder: Path, data: Data, objective: Objective,
                  accumulation: int) -> Checkpoint | None:
    def find() -> Checkpoint | None:
        found = find_resume_point(folder, config.run.resume, log.warning)
        if found is None:
            return None
        changed = check_may_continue(config, found, data.plan())
        if objective.couples_samples:
            check_same_accumulation(config.train, found, accumulation, processes.world_size)
        check_same_networks(found, objective)
        if other := FAMILIES.other_version(config.model.family, found.path):
            log.warning("%s was made with package %s: the run may go on otherwise than it would have", found.path, other)
        set_later_checkpoints_aside(folder, found.step, log.warning)
        for other in objective.rewards.other_versions(found.path) if objective.rewards is not None else ():
            log.warning("%s was made with a reward of package %s: the run may go on otherwise than it would have", found.path,
                        other)
        log.info("continuing from %s%s", found.path, f" with {'; '.join(changed)}" if changed else "")
        return found

    return processes.main_does(find)


def check_same_networks(checkpoint: Checkpoint, objective: Objective) -> None:
    """Raises UserError where the checkpoint holds a network of other shapes."""
    for name, network in objective.networks.items():
        if name not in objective.frozen:
            _check_same_network(checkpoint, name, network)


def _check_same_network(checkpoint: Checkpoint, name: str, network: torch.nn.Module) -> None:
    stored = checkpoint.tensors("networks", name).shapes()
    wanted = {key: tuple(value.shape) for key, value in named_state(network)}
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise UserError(f"run.resume: the checkpoint {checkpoint.path} holds another model: {name}.{key} is "
                            f"{stored.get(key, 'absent')} "
                            f"there and {wanted.get(key, 'absent')} here; begin a new run with another --run.name")


def prepare(config: Config, engine: Engine, objective: Objective, checkpoint: Checkpoint | None,
            pretrained: Callable[[str], Tensor] | None, frozen: Mapping[str, Read] | None = None) -> None:
    """Networks with the checkpoint's weights, or those to start from, under the strategy; then the rest of the checkpoint.

    Args:
        frozen: reads the weights of the frozen networks; None: they are those that the objective gives.
    """
    weights: dict[str, Read] = {}
    for name in objective.networks:
        if name in objective.frozen:
            weights[name] = frozen[name] if frozen is not None else objective.initial_weights(name)
        elif checkpoint is not None:
            weights[name] = checkpoint.tensors("networks", name)
        else:
            weights[name] = pretrained or objective.initial_weights(name)
    for network in objective.networks.values():
        begin_alike(network, engine.processes)
    engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer, config.train.precision), weights,
                   averaged_networks(config, objective), objective.frozen)
    objective.generating = engine.generating  # type: ignore[method-assign]
    if checkpoint is not None:
        load_beside_weights(engine, checkpoint)


def averaged_networks(config: Config, objective: Objective) -> tuple[str, ...]:
    """Names of the networks to keep an average of. Raises UserError where one is asked for and the family has none."""
    if not config.train.ema_half_life:
        return ()
    if not objective.averaged:
        raise UserError(f"train.ema_half_life: {config.train.ema_half_life:g}, but family {config.model.family} averages none "
                        "of its networks; nearest allowed: 0")
    return tuple(objective.averaged)


def open_loader(config: Config, data: Data, processes: Processes, micro_batch_size: int,
                state: dict[str, Any] | None = None) -> StepLoader:
    """This process's micro-batches, from the start or from where a checkpoint's `state` says."""
    state = state or {}
    return StepLoader(data, global_batch_size=config.train.global_batch_size, micro_batch_size=micro_batch_size,
                      rank=processes.rank, world_size=processes.world_size, workers=config.data.workers,
                      prefetch_steps=config.data.prefetch_steps, state=state.get("data"),
                      pin_memory=processes.device.type == "cuda", left_out=(state.get("guards") or {}).get("batches", ()))
