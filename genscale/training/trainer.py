"""WHEN: the loop. Steps, phases, hooks, stop; it knows no family and no strategy."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from genscale.config import Config
from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS
from genscale.objectives.base import Objective, Phase
from genscale.parallel.engine import Engine
from genscale.rng import Draws
from genscale.training.outcome import PhaseOutcome
from genscale.training.schedules import average_decay, learning_rate_share
from genscale.training.signals import StopSignal

log = logging.getLogger("genscale")
MicroBatches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Hook:
    """Something to do every so many steps, and after the last one (`every` 0: only then).

    Attributes:
        settled: only once the step's losses are known, and known to be finite. Without it a GPU may still be at the step.
    """

    every: int
    action: Callable[[StepReport], None]
    settled: bool = True

    def due(self, report: StepReport) -> bool:
        return report.last or (self.every > 0 and report.step % self.every == 0)


@dataclass
class StepReport:
    """What one step did; losses are reduced over all ranks and normalised by global counts.

    Attributes:
        metrics: learning_rate (by network where they differ) and, once settled, losses by term and grad_norm.
        data_digest: hash of the step's global samples, the same at any shape (the ledger).
        seconds, data_wait_seconds: of the step; waiting is part of it.
        last: no step follows, because the run is complete or was asked to stop, or because a hook has set it.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    data_digest: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    last: bool = False
    stopped: bool = False


class Trainer:
    """Runs every phase of every step through one body.

    Args:
        last_good: says where the last good checkpoint is, for the message of a run that went wrong.
        stop: the signals received so far, where somebody listens for them already.
    """

    def __init__(self, config: Config, objective: Objective, engine: Engine, loader: StepLoader, hooks: Sequence[Hook],
                 last_good: Callable[[], str], stop: StopSignal | None = None) -> None:
        self.config, self.objective, self.engine, self.loader, self.hooks = config, objective, engine, loader, hooks
        self.processes = engine.processes
        self.last_good = last_good
        self.stop = stop or StopSignal()
        self.skipped_steps = 0
        self.make_draws: Callable[..., Draws] = Draws
        self._runs_ahead = self.processes.device.type != "cpu"
        self._unsettled: list[tuple[StepReport, PhaseOutcome]] = []

    def run(self, first_step: int) -> StepReport | None:
        """Train from `first_step` to `train.steps`, or until a signal; every rank stops after the same step."""
        report = None
        with self.stop as stop:
            for step in range(first_step, self.config.train.steps + 1):
                report = self.train_step(step, stop)
                for hook in self.hooks:
                    if hook.due(report):
                        hook.action(report)
                if report.last:  # a hook may have ended the run
                    break
        return report

    def train_step(self, step: int, stop: StopSignal) -> StepReport:
        started = time.perf_counter()
        self.processes.note(f"step {step}")
        report = StepReport(step, self._set_learning_rates(step))
        # Phases share the step's batches; the i-th repeat of a phase takes the i-th of them.
        for repeat in range(max(phase.repeats for phase in self.objective.phases)):
            batches = self.loader.next_batch()
            report.data_wait_seconds += self.loader.wait_seconds
            report.data_digest = (report.data_digest + self.loader.digest()) % DIGEST_MODULUS
            for phase in self.objective.phases:
                if repeat < phase.repeats and step % phase.every == 0:
                    self._unsettled.append((report, self.run_phase(phase, step, batches)))
        self.update_averages(step)
        number, report.data_digest = self._agree(stop.received or 0, report.data_digest)
        report.stopped = number > 0
        stop.agreed = signal.Signals(number) if number else None
        report.last = report.stopped or step == self.config.train.steps
        self._settle(report)
        report.seconds = time.perf_counter() - started
        return report

    def run_phase(self, phase: Phase, step: int, batches: MicroBatches) -> PhaseOutcome:
        """Freeze all other networks; loss and backward of each micro-batch; reduce, clip, step; thaw.

        Nothing in here waits for the device."""
        engine, processes = self.engine, self.processes
        engine.train_only(phase.network, phase.second_order)
        networks = engine.view(phase.network)
        networks[phase.network].train()
        engine.begin_update(phase.network)
        (count,) = processes.sum_of_numbers(sum(phase.count(batch) for batch in batches))
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            draws = self.make_draws(self.config.run.seed, phase.name, step, batch["sample"], processes.device)
            batch = {key: value if key == "sample" else value.to(processes.device, non_blocking=True)
                     for key, value in batch.items()}
            with engine.micro_batch(phase.network, last=index == len(batches) - 1):
                with engine.forward_context():
                    terms = phase.loss(networks, batch, draws)
                # The terms are sums. Engines average gradients over processes, so the mean over the GLOBAL count needs
                # x world size.
                loss = sum(value for name, value in terms.items() if name not in phase.statistics)
                engine.backward(phase.network, loss * (processes.world_size / max(count, 1)))
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        result = engine.step(phase.network)
        engine.train_only(None)  # DeepSpeed's stage 3 gives no state of a frozen parameter
        return PhaseOutcome(step, phase, totals, count, result, processes)

    def _settle(self, report: StepReport) -> None:
        """Read what the steps came to, and stop at a loss that is no number.

        A GPU is given the next step before its last one is looked at, except where a hook wants to know: no checkpoint is ever
        written of weights that are not known to be finite."""
        wanted = report.last or any(hook.settled and hook.due(report) for hook in self.hooks)
        wanted = wanted or not self._runs_ahead
        ready = [each for each in self._unsettled if wanted or each[0] is not report]
        self._unsettled = [] if wanted else [each for each in self._unsettled if each[0] is report]
        for earlier, outcome in ready:
            if outcome.skipped(self.last_good):
                self.skipped_steps += 1
                log.info("step %d: gradient overflow in fp16, update skipped (%d so far)", earlier.step, self.skipped_steps)
            earlier.metrics.update(self.metrics_of(outcome))

    def metrics_of(self, outcome: PhaseOutcome) -> dict[str, float]:
        """Its numbers under the names they are logged by; waits for the device."""
        prefix = f"{outcome.phase.name}/" if len(self.objective.phases) > 1 else ""
        norm, means, _ = outcome.read()
        metrics = {f"{prefix}{name}": mean for name, mean in means.items()}
        losses = [mean for name, mean in means.items() if name not in outcome.phase.statistics]
        metrics.setdefault(f"{prefix}loss", sum(losses))
        metrics[f"{prefix}grad_norm"] = norm
        if self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        return metrics

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        """Of every network; returns them by the names they are logged by."""
        optimizer = self.config.optimizer
        share = learning_rate_share(step, self.config.train.steps, self.config.schedule)
        peaks = {name: optimizer.lr_of.get(name, optimizer.lr) for name in self.engine.optimizers}
        for name, peak in peaks.items():
            self.engine.set_learning_rate(name, peak * share)
        if len(set(peaks.values())) == 1:  # not of the rates, which meet where the schedule ends in zero
            return {"learning_rate": next(iter(peaks.values())) * share}
        return {f"learning_rate/{name}": peak * share for name, peak in peaks.items()}

    def update_averages(self, step: int) -> None:
        """Once a step, after all phases, of the networks that one of them has trained."""
        train = self.config.train
        for name in self.engine.averages:
            repeats = [phase.repeats for phase in self.objective.phases if phase.network == name and step % phase.every == 0]
            if repeats:
                samples = train.global_batch_size * max(repeats)
                self.engine.update_average(name, average_decay(step, samples, train.ema_half_life, train.ema_ramp_up))

    def _agree(self, stop: int, digest: int) -> tuple[int, int]:
        """All ranks stop alike, on the signal of the lowest rank that got one, and share one ledger entry."""
        if self.processes.world_size == 1:
            return stop, digest
        total, stopping = self.processes.sum_of_numbers(digest, int(stop > 0))
        if stopping:
            stop = next(number for number in self.processes.gather(stop) if number)
        return stop, total % DIGEST_MODULUS
