"""The hooks that count the steps and log what they came to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from genscale.data.loader import StepLoader
from genscale.hook import Hook, Order, StepReport
from genscale.objectives.base import Objective
from genscale.parallel.processes import Processes
from genscale.settings.config import DataSettings, TrainSettings
from genscale.tracking.peaks import device_name, peak_flops
from genscale.tracking.run_record import RunRecord
from genscale.tracking.throughput import Throughput
from genscale.training.data_wait import DataWait

log = logging.getLogger("genscale")


class Count(Hook):
    """Counts what has been trained on, and times it.

    Args:
        record: on rank 0, what is shown and kept of the run.

    Attributes:
        units: of the objective's clock, since the run began.
    """

    name, order, settled = "count", Order.COUNT, False

    def __init__(self, settings: TrainSettings, objective: Objective, processes: Processes, record: RunRecord | None) -> None:
        self.record, self.units = record, 0
        self.throughput = Throughput(objective.unit, objective.flops_per_unit(), processes.world_size,
                                     peak_flops(device_name(processes.device), settings.precision))
        # Each repeat of a phase takes a global batch of its own.
        batches = max(phase.repeats for phase in objective.phases)
        self.units_per_step = batches * settings.global_batch_size * objective.units_per_sample

    def step(self, report: StepReport) -> None:
        """The step is done."""
        self.units += self.units_per_step
        if self.record is not None:
            self.record.step(report.step)
        self.throughput.step(report.seconds, report.data_wait_seconds, self.units_per_step)

    def state(self) -> dict[str, Any]:
        return {"units": self.units}

    def load_state(self, state: dict[str, Any]) -> None:
        self.units = state.get("units", 0)

    def rolled_back(self, step: int) -> None:
        self.throughput.read()
        if self.record is not None:
            self.record.rolled_back(step)


class LogMetrics(Hook):
    """Writes metrics.jsonl, tells the trackers, and shows progress.

    Args:
        every: so many steps.
        data: the `data` section, which a hint to a run that waits for its data is made of.
        hold_up: seconds that the last checkpoint has held up the steps, once.
        score: what is shown of the latest evaluation.
    """

    name, order = "log_metrics", Order.LOG

    def __init__(self, every: int, data: DataSettings, count: Count, loader: StepLoader, processes: Processes,
                 record: RunRecord | None, unit: str, hold_up: Callable[[], float | None],
                 score: Callable[[], dict[str, float]]) -> None:
        self.every, self.unit = every, unit
        self.count, self.loader, self.processes, self.record = count, loader, processes, record
        self._hold_up, self._score = hold_up, score
        self._data_wait = DataWait(data, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self._retries = 0

    def step(self, report: StepReport) -> None:
        """Collective."""
        line = {**report.metrics, self.unit: self.count.units, **self.count.throughput.read(),
                "data_digest": report.data_digest}
        if (seconds := self._hold_up()) is not None:
            line["checkpoint_hold_up_seconds"] = seconds
        new, self.loader.retries = self.loader.retries, 0
        self._retries += self.processes.sum_of_numbers(new)[0]
        if self._retries:
            line["retries"] = self._retries
        if self.record is not None:
            if hint := self._data_wait.hint(line.get("data_wait_share", 0.0)):
                log.warning("%s", hint)
            self.record.write(report.step, line, self._score())
