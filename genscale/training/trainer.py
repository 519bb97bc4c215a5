"""WHEN: the loop. Steps, phases, hooks, stop; it knows no family and no strategy."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genscale.config import Config
from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS
from genscale.objectives.base import Objective, Phase
from genscale.parallel.engine import Engine, StepResult
from genscale.parallel.launcher import follow_launcher
from genscale.rng import Draws
from genscale.training.guards import NonFiniteLoss, StopSignal
from genscale.training.schedules import learning_rate_share

log = logging.getLogger("genscale")
MicroBatches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Hook:
    """Something to do every so many steps, and after the last one (`every` 0: only then)."""

    every: int
    action: Callable[[StepReport], None]

    def due(self, report: StepReport) -> bool:
        return report.last or (self.every > 0 and report.step % self.every == 0)


@dataclass
class StepReport:
    """What one step did; losses are reduced over all ranks and normalised by global counts.

    Attributes:
        metrics: losses by term, grad_norm and learning_rate.
        data_digest: hash of the step's global samples, the same at any shape (the ledger).
        seconds, data_wait_seconds: of the step; waiting is part of it.
        last: no step follows, because the run is complete or was asked to stop.
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
    """

    def __init__(self, config: Config, objective: Objective, engine: Engine, loader: StepLoader, hooks: Sequence[Hook],
                 last_good: Callable[[], str]) -> None:
        self.config, self.objective, self.engine, self.loader, self.hooks = config, objective, engine, loader, hooks
        self.processes = engine.processes
        self.last_good = last_good
        self.skipped_steps = 0
        self.stopped_by: signal.Signals | None = None

    def run(self, first_step: int) -> StepReport | None:
        """Train from `first_step` to `train.steps`, or until a signal; every rank stops after the same step."""
        report = None
        with StopSignal() as stop:
            follow_launcher()
            for step in range(first_step, self.config.train.steps + 1):
                report = self.train_step(step, stop)
                for hook in self.hooks:
                    if hook.due(report):
                        hook.action(report)
                if report.stopped:
                    break
        return report

    def train_step(self, step: int, stop: StopSignal) -> StepReport:
        started = time.perf_counter()
        report = StepReport(step, {"learning_rate": self._set_learning_rate(step)})
        # Phases share the step's batches; the i-th repeat of a phase takes the i-th of them.
        for repeat in range(max(phase.repeats for phase in self.objective.phases)):
            batches = self.loader.next_batch()
            report.data_wait_seconds += self.loader.wait_seconds
            report.data_digest = (report.data_digest + self.loader.digest()) % DIGEST_MODULUS
            for phase in self.objective.phases:
                if repeat < phase.repeats and step % phase.every == 0:
                    report.metrics.update(self.run_phase(phase, step, batches))
        number, report.data_digest = self._agree(stop.received or 0, report.data_digest)
        report.stopped = number > 0
        self.stopped_by = signal.Signals(number) if number else None
        report.last = report.stopped or step == self.config.train.steps
        report.seconds = time.perf_counter() - started
        return report

    def run_phase(self, phase: Phase, step: int, batches: MicroBatches) -> dict[str, float]:
        """Freeze all other networks; loss and backward of each micro-batch; reduce, clip, step; thaw."""
        engine, processes = self.engine, self.processes
        engine.train_only(phase.network)
        networks = engine.view(phase.network)
        networks[phase.network].train()
        count = int(processes.sum(torch.tensor([sum(phase.count(batch) for batch in batches)])).item())
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            draws = Draws(self.config.run.seed, phase.name, step, batch["sample"], processes.device)
            batch = {key: value.to(processes.device, non_blocking=True) for key, value in batch.items()}
            with engine.micro_batch(phase.network, last=index == len(batches) - 1):
                with engine.forward_context():
                    terms = phase.loss(networks, batch, draws)
                # The terms are sums. Engines average gradients over processes, so the mean over the GLOBAL count needs
                # x world size.
                engine.backward(phase.network, sum(terms.values()) * (processes.world_size / max(count, 1)))
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        result = engine.step(phase.network)
        engine.train_only(None)  # DeepSpeed's stage 3 gives no state of a frozen parameter
        self._guard(step, phase, totals, result)
        return self._metrics(phase, totals, count, result)

    def _metrics(self, phase: Phase, totals: dict[str, Tensor], count: int, result: StepResult) -> dict[str, float]:
        prefix = f"{phase.name}/" if len(self.objective.phases) > 1 else ""
        means = (self.processes.sum(torch.stack(list(totals.values()))) / max(count, 1)).tolist()
        metrics = {f"{prefix}{name}": mean for name, mean in zip(totals, means, strict=True)}
        metrics.setdefault(f"{prefix}loss", sum(means))
        metrics[f"{prefix}grad_norm"] = result.grad_norm
        if self.skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        return metrics

    def _set_learning_rate(self, step: int) -> float:
        share = learning_rate_share(step, self.config.train.steps, self.config.schedule)
        lr = self.config.optimizer.lr * share
        for name in self.engine.optimizers:
            self.engine.set_learning_rate(name, lr)
        return lr

    def _agree(self, stop: int, digest: int) -> tuple[int, int]:
        """All ranks stop alike, on the signal of the lowest rank that got one, and share one ledger entry."""
        if self.processes.world_size == 1:
            return stop, digest
        total, stopping = self.processes.sum(torch.tensor([digest, int(stop > 0)])).tolist()
        if stopping:
            stop = next(number for number in self.processes.gather(stop) if number)
        return stop, total % DIGEST_MODULUS

    def _guard(self, step: int, phase: Phase, totals: dict[str, Tensor], result: StepResult) -> None:
        """Stop on a loss or gradient that is no longer a number. The norm is global, so every rank comes here alike."""
        if math.isfinite(result.grad_norm):
            return
        last_good = self.processes.main_does(self.last_good)
        losses = self.processes.gather({name: value.item() for name, value in totals.items()})
        for rank, terms in enumerate(losses):
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise NonFiniteLoss(f"{phase.name}/{name} became {value} at step {step} on rank {rank}; last good "
                                        f"checkpoint: {last_good}; try a lower optimizer.lr, a longer "
                                        "schedule.warmup_steps, or train.precision bf16 instead of fp16")
        if result.skipped:
            self.skipped_steps += 1
            log.info("step %d: gradient overflow in fp16, update skipped (%d so far)", step, self.skipped_steps)
            return
        raise NonFiniteLoss(f"the gradient of {phase.network} became {result.grad_norm} at step {step} (the loss "
                            f"was finite); last good checkpoint: {last_good}; try a lower optimizer.lr or train.clip")
