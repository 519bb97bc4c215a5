"""A run from its config to its end: what is built, in which order, and what is checked before the first step."""

from __future__ import annotations

import logging
import platform
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.frozen_networks import keep_frozen, same_judges
from genscale.checkpoint.provenance import chosen_plugins
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.errors import UserError
from genscale.hook import Hook, hooks_by_name
from genscale.interop.starting import keep_for_export, weights_from
from genscale.objectives.base import Objective
from genscale.parallel.determinism import deterministic
from genscale.parallel.engine import Engine
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.launcher import follow_launcher, launcher_is_gone
from genscale.parallel.precision import allow_tf32
from genscale.parallel.processes import Processes, on_cpu
from genscale.parallel.strategies import ParallelPlan, build_engine, hardly_heeded, plan_parallel
from genscale.settings.config import Config
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
from genscale.tracking.metrics_file import read_metrics
from genscale.training.collapse import Collapsed
from genscale.training.hooks import RunHooks, configured_hooks
from genscale.training.rollback import GoBack
from genscale.training.schedules import never_reached
from genscale.training.setup import (
    averaged_networks,
    check_same_networks,
    check_settings,
    derive_accumulation,
    open_loader,
    open_objective,
    prepare,
)
from genscale.training.trainer import Trainer
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
    hooks_by_name(hooks)  # what is none must show first
    with deterministic(config.run.deterministic), stop or StopSignal() as listening:
        return _start(config, listening, hooks)


def _start(config: Config, stop: StopSignal, hooks: Sequence[Hook]) -> RunResult:
    with before_the_run():
        check_settings(config)
        added = hooks_by_name([*configured_hooks(config), *hooks])
        plan = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
        config = plan.settled(config)
        shape = derive_accumulation(config.train, plan.world_size, plan.context)
        folder = run_folder(config.run)
        check_batch_memory(config.data, shape[0], config.train.steps)
        if config.train.tf32 and on_cpu():
            raise UserError("train.tf32: true has no effect on the CPU, which computes fp32 in fp32; leave it out")
    clear_launch_environment()
    with before_the_run():
        processes = Processes(plan.needs_group, group_timeout_minutes(config.guards.hang_minutes), plan.context)
        if config.train.tf32:
            allow_tf32()
    try:
        with Supervision(config.guards.hang_minutes, folder, processes, stop) as supervision:
            return _train(config, processes, plan, shape, folder, supervision, added)
    finally:
        processes.close()


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
        averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
        averages = sum(sizes[name] for name in averaged)
        started = processes.gather((platform.node(), shape))
        check_alike([each for _, each in started])
        hosts = [host for host, _ in started]
        here = hosts.count(hosts[0])
        copies = plan.copies_of_weights(here) if processes.device.type == "cpu" else 0
        processes.main_does(lambda: check_host_memory(parameters, averages, here / len(hosts), copies,
                                                      frozen_parameters))
        processes.main_does(lambda: check_free_space(folder, parameters, averages, config.train, log.warning,
                                                     frozen_parameters))
        checkpoint = _resume_point(config, processes, folder, data, objective, accumulation)
        engine = build_engine(plan, processes, config.parallel, config.train.precision, config.train.clip,
                              micro_batch_size, accumulation)
        pretrained = None if checkpoint else processes.all_do(lambda: weights_from(config.model))
        frozen, reads = keep_frozen(objective, folder, checkpoint, processes, pretrained)
        judges = same_judges(objective, checkpoint, processes)
        prepare(engine, objective, config.optimizer, averaged, checkpoint, pretrained, reads)
        state = checkpoint.state() if checkpoint else {}
        loader = open_loader(data, config.data, config.train.global_batch_size, micro_batch_size, processes, state)
        processes.main_does(lambda: _write_what_it_is(config, folder, objective, pretrained is not None))
        if processes.is_main:
            for line in [*never_reached(config), *hardly_heeded(plan, config.parallel)]:
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
                         supervision.owner.check if supervision.owner else None, added,
                         {"frozen": frozen, "judges": judges})
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


def check_alike(shapes: Sequence[tuple[int, int]]) -> None:
    """Raises UserError where processes were started with other micro-batches than rank 0, or have planned others."""
    other = next((rank for rank, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise UserError(f"train.micro_batch_size: {shapes[0][0]} on rank 0 and {shapes[other][0]} on rank {other}; give all "
                        f"processes one number, as {min(size for size, _ in shapes)}")


def _write_what_it_is(config: Config, folder: Path, objective: Objective, pretrained: bool) -> None:
    """What is read of a run besides its checkpoints. Raises UserError where it cannot be written."""
    try:
        write_whole(folder / "config.yaml", config_yaml(config))
        objective.save_assets(folder)
        if pretrained:
            keep_for_export(config.model.from_, config.data.tokenizer, folder)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder} ({error.strerror}); free some space, or set --run.dir to another "
                        "folder") from None


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
        for plugins, name in chosen_plugins(config):
            if other := plugins.other_version(name, found.path):
                log.warning("%s was made with package %s: the run may go on otherwise than it would have", found.path, other)
        set_later_checkpoints_aside(folder, found.step, log.warning)
        for other in objective.rewards.other_versions(found.path) if objective.rewards is not None else ():
            log.warning("%s was made with a reward of package %s: the run may go on otherwise than it would have", found.path,
                        other)
        log.info("continuing from %s%s", found.path, f" with {'; '.join(changed)}" if changed else "")
        return found

    return processes.main_does(find)
