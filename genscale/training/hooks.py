"""What happens beside the steps: logging, evaluation, samples, checkpoints. Each is small and due every so many steps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.evaluation.validation import evaluating, validate
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine
from genscale.settings.config import Config
from genscale.tracking.peaks import device_name, peak_flops
from genscale.tracking.run_record import RunRecord
from genscale.tracking.throughput import Throughput
from genscale.tracking.writes import Writes
from genscale.training.best_checkpoint import best_of, better_of, check_metric
from genscale.training.checkpoints import Checkpoint, list_checkpoints
from genscale.training.collapse import CollapseWatch
from genscale.training.data_wait import DataWait
from genscale.training.profile import Profile
from genscale.training.provenance import position_in_words, provenance
from genscale.training.restoring import restore
from genscale.training.run_folder import config_dict, config_yaml
from genscale.training.saving import Contents, Saver
from genscale.training.signals import StopSignal
from genscale.training.step_report import Hook, StepReport
from genscale.training.trace import NAME as TRACE
from genscale.training.trace import Trace

log = logging.getLogger("genscale")


class RunHooks:
    """The hooks of one run and what they share. Files and trackers exist on rank 0 only; collectives run on every rank.

    Args:
        state: state.json of the checkpoint the run continues from, or an empty dict.
        stop: the signals received so far; one ends an evaluation.
        may_commit: raises where the run folder is another's by now.

    Attributes:
        evaluation: metrics of the last evaluation.
        preview: the last sample: text, or the file of a picture.
        collapse: why the collapse watch has ended the run, if it has.
    """

    def __init__(self, config: Config, folder: Path, engine: Engine, objective: Objective, data: Data, loader: StepLoader,
                 state: dict[str, Any], stop: StopSignal, may_commit: Callable[[], object] | None) -> None:
        self.config, self.folder, self.objective, self.data, self.loader = config, folder, objective, data, loader
        self.engine, self.processes, self.stop = engine, engine.processes, stop
        self.throughput = Throughput(objective.unit, objective.flops_per_unit(), self.processes.world_size,
                                     peak_flops(device_name(self.processes.device), config.train.precision))
        # Each repeat of a phase takes a global batch of its own.
        batches = max(phase.repeats for phase in objective.phases)
        self.units_per_step = batches * config.train.global_batch_size * objective.units_per_sample
        self._take_up(state)
        self.preview: str | Path = ""
        self.collapse: str | None = None
        self.guards_state: Callable[[], dict[str, Any]] = dict  # the trainer's, once there is one
        self.data_wait = DataWait(config.data, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._retries = 0
        self.validation_set = data.validation()
        done = state.get("step", 0)
        self.profile: Profile | None = None
        self.writes = Writes(log.warning)
        if self.processes.is_main:
            self.run_record = RunRecord(folder, config, config_dict(config), objective.unit, done, self.writes)
            if config.train.profile and done < config.train.steps:
                self.profile = Profile(folder / "profile", config.train.profile, config.train.steps - done)
        self.trace = Trace(folder, engine, done) if config.run.trace else None
        self.saver = Saver(folder / "checkpoints", self.processes, config.train.checkpoint_keep,
                           config.train.checkpoint_keep_every, may_commit)
        self._best_in_flight: dict[str, Any] | None = None
        self._hold_up: float | None = None
        self._saved_at = time.monotonic()
        if config.train.checkpoint_best != "loss":  # which all have; what else there is, only an evaluation can tell
            evaluation = self.evaluation or self._validate(done)
            if evaluation is not None:
                check_metric(config.train.checkpoint_best, evaluation)

    def _take_up(self, state: dict[str, Any]) -> None:
        self.units = state.get("units", 0)
        self.best = best_of(state, self.config.train.checkpoint_best)
        self.evaluation: dict[str, float] = state.get("evaluation", {})
        self.evaluated_step: int | None = None
        self._left_out: bool = state.get("evaluation_left_out", False)
        self.watch = CollapseWatch(self.config.train, state.get("collapse"))

    def rolled_back(self, state: dict[str, Any]) -> None:
        """The run goes on from the checkpoint with this state: what was written of later steps will be written again.
        Collective, and the engine is as it was then."""
        self._take_up(state)
        self.throughput.read()
        step = state["step"]
        if self.trace is not None:
            self.writes.attempt(TRACE, lambda: self.trace.rolled_back(step))
        if self.processes.is_main:
            self.run_record.rolled_back(step)
        self.make_up(step)

    def list(self) -> list[Hook]:
        """In the order they run: the profiler sees steps, not what follows the last of them; a checkpoint comes after the
        evaluation that may make it the best."""
        train = self.config.train
        profile = [Hook(1, self.profile.step, settled=False)] if self.profile else []
        trace = [Hook(1, self.record)] if self.trace else []
        return [*profile, Hook(1, self.count, settled=False), *trace, Hook(train.log_every, self.log_metrics),
                Hook(train.evaluate_every, self.evaluate, sound=True), Hook(train.sample_every, self.sample, sound=True),
                Hook(train.checkpoint_every, self.checkpoint, sound=True,
                     by_clock=self._minutes_are_up if train.checkpoint_minutes else None)]

    def _minutes_are_up(self) -> bool:
        return time.monotonic() - self._saved_at >= 60 * self.config.train.checkpoint_minutes

    def count(self, report: StepReport) -> None:
        self.units += self.units_per_step
        if self.processes.is_main:
            self.run_record.step(report.step)
        self.throughput.step(report.seconds, report.data_wait_seconds, self.units_per_step)

    def record(self, report: StepReport) -> None:
        self.writes.attempt(TRACE, lambda: self.trace.record(report))

    def log_metrics(self, report: StepReport) -> None:
        line = {**report.metrics, self.objective.unit: self.units, **self.throughput.read(),
                "data_digest": report.data_digest}
        if self._hold_up is not None:
            line["checkpoint_hold_up_seconds"], self._hold_up = self._hold_up, None
        new, self.loader.retries = self.loader.retries, 0
        self._retries += self.processes.sum_of_numbers(new)[0]
        if self._retries:
            line["retries"] = self._retries
        if self.processes.is_main and (hint := self.data_wait.hint(line.get("data_wait_share", 0.0))):
            log.warning("%s", hint)
        self._write(report.step, line, show=True)

    def evaluate(self, report: StepReport) -> None:
        started = time.perf_counter()
        # A stop has seconds, not minutes, before the scheduler's SIGKILL.
        found = None if report.stopped else self._validate(report.step)
        if found is None:
            report.stopped = report.last = True
            every = self.config.train.evaluate_every
            self._left_out = every > 0 and report.step % every == 0
            return
        self.evaluation = found
        self.evaluated_step = report.step
        line = {f"validation_{name}": value for name, value in self.evaluation.items()}
        line["evaluation_seconds"] = time.perf_counter() - started
        loss = self.processes.main_does(lambda: self.evaluation["loss"])  # what follows is collective
        collapsed = self.watch.collapsed(loss)
        if collapsed:
            line["collapses"] = self.watch.collapses
        self._write(report.step, line)
        if collapsed:
            self._end_or_restore(report, loss)

    def make_up(self, step: int) -> None:
        """The evaluation of the step the run goes on from, where a stop left it out: the collapse watch and the best checkpoint
        depend on it."""
        train = self.config.train
        if not self._left_out or step >= train.steps:
            return
        self._left_out = False
        if self.processes.is_main:
            self.run_record.evaluated_anew(step)
        self.evaluate(StepReport(step))
        if train.checkpoint_every and step % train.checkpoint_every == 0:
            self.best = self._best_with(step)

    def _validate(self, step: int) -> dict[str, float] | None:
        """None where a signal has cut it short."""
        processes = self.processes

        def go_on(batch: int) -> bool:
            processes.note(f"step {step}, evaluation, batch {batch + 1}")
            return not self.stop.agree(processes)

        with self.engine.averaged():
            return validate(self.objective, self.engine.view(None), self.validation_set,
                            batch_size=self.engine.micro_batch_size, rank=processes.rank, world_size=processes.world_size,
                            device=processes.device, reduce_sum=processes.sum, autocast=self.engine.forward_context,
                            go_on=go_on)

    def _end_or_restore(self, report: StepReport, loss: float) -> None:
        self.settle_save()
        best = self.processes.main_does(self._best_checkpoint)
        if best is None or self.config.train.collapse == "stop":
            where = f"best checkpoint: {best.path if best else 'none'}"
            advice = "try a lower optimizer.lr" + (", or train.collapse restore" if best else "")
            self.collapse = self.watch.verdict(report.step, loss, f"{where}; {advice}")
            report.last = True
            return
        log.warning("%s", self.watch.verdict(report.step, loss, f"going back to the weights of {best.path}"))
        restore(self.engine, best)
        self.watch.forget()
        self.evaluation, self.evaluated_step = best.state()["evaluation"], None

    def _best_checkpoint(self) -> Checkpoint | None:
        """The best checkpoint, if it is there and whole."""
        if self.best is None:
            return None
        checkpoint = Checkpoint(self.folder / "checkpoints" / f"step-{self.best['step']:08d}")
        if problem := checkpoint.problem():
            log.warning("the best checkpoint %s is damaged (%s)", checkpoint.path, problem)
            return None
        return checkpoint

    def sample(self, report: StepReport) -> None:
        if report.stopped:
            return
        networks = self.engine.view(None)
        with self.engine.averaged(), evaluating(networks), self.engine.forward_context():
            preview = self.objective.preview(networks, self.config.run.seed, self.processes.device)
        file = self.folder / "samples" / f"step-{report.step:08d}"
        if isinstance(preview, str):
            self.preview, file = preview, file.with_suffix(".txt")
        else:
            self.preview = file = file.with_suffix(".png")
        if self.processes.is_main:
            self.run_record.sample(report.step, file, preview)

    def checkpoint(self, report: StepReport) -> None:
        """Copy the full state, each rank its part, and write it in the background. A failed write is a warning, except after
        the last step.

        The best checkpoint is the one with the best `train.checkpoint_best` among those evaluated at their own step.
        """
        started = time.perf_counter()
        self.settle_save()
        best = self._best_with(report.step)
        pieces = {}
        for name in self.objective.networks:
            pieces[f"networks/{name}"] = self.engine.network_pieces(name)
            pieces[f"optimizers/{name}"] = self.engine.optimizer_pieces(name)
        for name in self.engine.averages:
            pieces[f"averages/{name}"] = self.engine.average_pieces(name)
        data = merge_states(self.processes.gather(self.loader.state()), self.data.lane_count)
        state = {"step": report.step, "units": self.units, "best": best, "evaluation": self.evaluation,
                 "evaluation_left_out": self._left_out,
                 "collapse": self.watch.state(), "accumulation": self.engine.accumulation,
                 "scalers": {name: self.engine.scaler_state(name) for name in self.objective.networks},
                 "guards": self.guards_state(), "data": data, "plan": self.data.plan(), "world_size": self.processes.world_size}
        position = position_in_words(data["batches"] * self.config.train.global_batch_size, self.data.samples_of_epoch())
        about = provenance(self.processes.world_size, self.engine.strategy, position)
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

    def _best_with(self, step: int) -> dict[str, Any] | None:
        """The best checkpoint so far, if there is now one of this step."""
        if self.evaluated_step != step:
            return self.best
        metric = self.config.train.checkpoint_best
        return better_of(self.best, step, metric, self.evaluation, metric in self.objective.higher_is_better)

    def last_good(self) -> str:
        """Where a run that went wrong can be taken up again. Collective."""
        self.settle_save()
        found = self.processes.main_does(lambda: list_checkpoints(self.folder / "checkpoints"))
        return str(found[-1].path) if found else "none"

    def already_complete(self, step: int) -> None:
        log.info("nothing to do: the run is complete at step %d; raise train.steps to train on", step)
        found = self._validate(step)
        if found is not None:
            self.evaluation = found
            self.sample(StepReport(step, last=True))

    def _write(self, step: int, line: dict[str, float], show: bool = False) -> None:
        if self.processes.is_main:
            self.run_record.write(step, line, self._score() if show else None)

    def _score(self) -> dict[str, float]:
        """The latest validation loss, by its second name where it has one (`fd`); beside one phase's loss it has no room."""
        loss = self.evaluation.get("loss")
        if loss is None or len(self.objective.phases) == 1:
            return {}
        second = next((name for name, value in self.evaluation.items() if name != "loss" and value == loss), None)
        return {f"validation_{second}" if second else "validation": loss}

    def close(self, failed: bool) -> None:
        self.saver.finish()
        if self.trace is not None:
            self.writes.attempt(TRACE, self.trace.close)
        if not self.processes.is_main:
            return
        if self.profile is not None:
            self.profile.close()
        self.run_record.close(failed, self.objective.loss_unit)
