"""The hooks that look at the networks: evaluation, with the collapse watch that goes by it, and samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.restoring import restore
from genscale.evaluation.validation import evaluating, validate
from genscale.hook import Hook, Order, StepReport
from genscale.objectives.base import Objective
from genscale.parallel.engine import Engine
from genscale.settings.config import TrainSettings
from genscale.supervise.signals import StopSignal
from genscale.tracking.run_record import RunRecord
from genscale.training.collapse import CollapseWatch

log = logging.getLogger("genscale")


class Evaluate(Hook):
    """Evaluates on the validation set, with the averaged weights where there are some, and watches for a collapse.

    Args:
        record: on rank 0, what is shown and kept of the run.
        stop: the signals received so far; one ends an evaluation.
        best_checkpoint: the best one on the disk, if there is one and it is whole. Collective.

    Attributes:
        found: metrics of the last evaluation.
        at_step: its step; None where the weights have changed since otherwise than by training.
        left_out: a stop has left the evaluation of the last step out, which was due.
        collapse: why the collapse watch has ended the run, if it has.
    """

    name, order, sound = "evaluate", Order.EVALUATE, True

    def __init__(self, settings: TrainSettings, engine: Engine, objective: Objective,
                 validation_set: list[dict[str, np.ndarray]], record: RunRecord | None, stop: StopSignal,
                 best_checkpoint: Callable[[], Checkpoint | None]) -> None:
        self.settings, self.every = settings, settings.evaluate_every
        self.engine, self.processes, self.objective, self.validation_set = engine, engine.processes, objective, validation_set
        self.record, self.stop, self.best_checkpoint = record, stop, best_checkpoint
        self.collapse: str | None = None
        self.load_state({})

    def load_state(self, state: dict[str, Any]) -> None:
        self.found: dict[str, float] = state.get("evaluation", {})
        self.at_step: int | None = None
        self.left_out: bool = state.get("evaluation_left_out", False)
        self.watch = CollapseWatch(self.settings, state.get("collapse"))

    def state(self) -> dict[str, Any]:
        return {"evaluation": self.found, "evaluation_left_out": self.left_out, "collapse": self.watch.state()}

    def step(self, report: StepReport) -> None:
        """Collective. What it finds is added to the report's metrics."""
        started = time.perf_counter()
        # A stop has seconds, not minutes, before the scheduler's SIGKILL.
        found = None if report.stopped else self.validate(report.step)
        if found is None:
            report.stopped = report.last = True
            self.left_out = self.every > 0 and report.step % self.every == 0
            return
        self.found, self.at_step = found, report.step
        line = {f"validation_{name}": value for name, value in found.items()}
        report.metrics.update(line)
        line["evaluation_seconds"] = time.perf_counter() - started
        loss = self.processes.main_does(lambda: found["loss"])  # what follows is collective
        collapsed = self.watch.collapsed(loss)
        if collapsed:
            line["collapses"] = self.watch.collapses
        if self.record is not None:
            self.record.write(report.step, line)
        if collapsed:
            self._end_or_restore(report, loss)

    def validate(self, step: int) -> dict[str, float] | None:
        """Metrics on the validation set; None where a signal has cut it short. Collective."""
        processes = self.processes
        if self.objective.rewards is not None:  # that of the last update may be a later one, which the run has gone back from
            self.objective.rewards.step = step

        def go_on(batch: int) -> bool:
            processes.note(f"step {step}, evaluation, batch {batch + 1}")
            return not self.stop.agree(processes)

        with self.engine.averaged():
            return validate(self.objective, self.engine.view(None), self.validation_set,
                            batch_size=self.engine.micro_batch_size, rank=processes.data_rank,
                            world_size=processes.data_world, device=processes.device, reduce_sum=processes.sum,
                            autocast=self.engine.forward_context, go_on=go_on)

    def _end_or_restore(self, report: StepReport, loss: float) -> None:
        best = self.best_checkpoint()
        if best is None or self.settings.collapse == "stop":
            where = f"best checkpoint: {best.path if best else 'none'}"
            advice = "try a lower optimizer.lr" + (", or train.collapse restore" if best else "")
            self.collapse = self.watch.verdict(report.step, loss, f"{where}; {advice}")
            report.last = True
            return
        log.warning("%s", self.watch.verdict(report.step, loss, f"going back to the weights of {best.path}"))
        restore(self.engine, best)
        self.watch.forget()
        self.found, self.at_step = best.state()["evaluation"], None

    def score(self) -> dict[str, float]:
        """The latest validation loss, by its second name where it has one (`fd`); beside one phase's loss it has no room."""
        loss = self.found.get("loss")
        if loss is None or len(self.objective.phases) == 1:
            return {}
        second = next((name for name, value in self.found.items() if name != "loss" and value == loss), None)
        return {f"validation_{second}" if second else "validation": loss}


class Sample(Hook):
    """Draws a small sample: the same latents or the same start each time.

    Args:
        every: so many steps.
        seed: of what it is drawn from.
        folder: of the run.

    Attributes:
        preview: the last one: text, or the file of a picture.
    """

    name, order, sound = "sample", Order.SAMPLE, True

    def __init__(self, every: int, seed: int, folder: Path, engine: Engine, objective: Objective,
                 record: RunRecord | None) -> None:
        self.every, self.seed, self.folder = every, seed, folder
        self.engine, self.objective, self.record = engine, objective, record
        self.preview: str | Path = ""

    def step(self, report: StepReport) -> None:
        """Collective."""
        if report.stopped:
            return
        networks = self.engine.view(None)
        with self.engine.averaged(), evaluating(networks), self.engine.forward_context():
            preview = self.objective.preview(networks, self.seed, self.engine.processes.device)
        file = self.folder / "samples" / f"step-{report.step:08d}"
        if isinstance(preview, str):
            self.preview, file = preview, file.with_suffix(".txt")
        else:
            self.preview = file = file.with_suffix(".png")
        if self.record is not None:
            self.record.sample(report.step, file, preview)
