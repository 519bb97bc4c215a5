"""WHEN: the loop. Steps, phases, hooks, stop; it knows no family and no strategy."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS
from genscale.errors import UserError
from genscale.hook import Hook, StepReport
from genscale.models.device_kind import is_planned
from genscale.objectives.base import Objective, Phase
from genscale.parallel.engine import Engine, StepResult
from genscale.rng import Draws, DrawsAhead
from genscale.settings.config import Config
from genscale.supervise.signals import StopSignal
from genscale.training.dry_batch import without_a_trace
from genscale.training.kept_buffers import KeptBuffers
from genscale.training.non_finite import NonFiniteLoss, calmer
from genscale.training.out_of_memory import advice, is_out_of_memory
from genscale.training.phase_outcome import PhaseOutcome
from genscale.training.replicas import changes_are_declared, has_undeclared
from genscale.training.schedules import average_decay, learning_rate_share
from genscale.training.update_guard import RollBack, UpdateGuard

log = logging.getLogger("genscale")
MicroBatches = list[dict[str, Tensor]]
Count = Callable[[], int]
GoBack = Callable[[frozenset[int]], tuple[int, dict[str, Any]] | None]
"""Takes networks, optimizers and loader back to the latest checkpoint, from where the loader leaves these global batches out:
its step and what the guard has kept in it; or None, where there is none. Collective."""


class Trainer:
    """Runs every phase of every step through one body.

    Args:
        last_good: says where the last good checkpoint is, for the message of a run that went wrong. Collective.
        stop: the signals received so far, where somebody listens for them already.
        guard_state: `state` of the checkpoint that the run goes on from.
        go_back: how to go back to a checkpoint; None: a run that would have to stops.
    """

    def __init__(self, config: Config, objective: Objective, engine: Engine, loader: StepLoader, hooks: Sequence[Hook],
                 last_good: Callable[[], str], stop: StopSignal | None = None, guard_state: dict[str, Any] | None = None,
                 go_back: GoBack | None = None) -> None:
        self.config, self.objective, self.engine, self.loader, self.hooks = config, objective, engine, loader, hooks
        self.processes = engine.processes
        self.last_good, self.go_back = last_good, go_back
        self.stop = stop or StopSignal()
        self.guard = UpdateGuard(config.guards, config.train.global_batch_size, calmer(config.train, config.schedule),
                                 self.processes, last_good, guard_state)
        phases = objective.phases
        self._batches_a_step = max(phase.repeats for phase in phases)
        self.make_draws: Callable[..., Draws] = DrawsAhead(self._batches_a_step * config.train.global_batch_size,
                                                           {phase.name: phase.every for phase in phases})
        self._runs_ahead = self.processes.device.type != "cpu" or is_planned()
        self._unsettled: list[tuple[StepReport, PhaseOutcome]] = []
        self._batch = 0
        self._updated: dict[str, bool | Tensor] = {}  # by network, since its average was last moved
        self._buffers: dict[str, KeptBuffers] = {}  # by network
        self._put_off: set[int] = set()  # numbers of hooks

    def state(self) -> dict[str, Any]:
        """What the next steps depend on besides networks, optimizers and data, as JSON."""
        return self.guard.state()

    def run(self, first_step: int) -> StepReport | None:
        """Train from `first_step` to `train.steps`, or until a signal; every rank stops after the same step.

        Raises:
            UserError: the run went wrong (NonFiniteLoss), or does not fit in memory.
        """
        report, step, too_large = None, first_step, None
        with self.stop as stop:
            try:
                if (self.config.guards.dry_batch or has_undeclared(self.engine)) and step <= self.config.train.steps:
                    self._rehearse(step)
                while step <= self.config.train.steps:
                    try:
                        report = self.train_step(step, stop)
                        self._run_hooks(report)
                    except RollBack as trouble:
                        step = self._roll_back(trouble) + 1
                        continue
                    if report.last:  # a hook may have ended the run
                        break
                    step += 1
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_large = advice(self.config, self.engine, self.objective)
            if too_large is not None:  # said where the error is gone, whose frames hold the batch: the end takes memory too
                raise UserError(too_large)
        return report

    def _run_hooks(self, report: StepReport) -> None:
        sound = None
        for number, hook in enumerate(self.hooks):
            if not hook.due(report) and number not in self._put_off:
                continue
            if hook.sound:
                sound = self._is_sound(report) if sound is None else sound
                if not sound:
                    self._put_off.add(number)
                    continue
            self._put_off.discard(number)
            if hook.settled:  # the others take no time to speak of
                self.processes.note(f"step {report.step}, {hook.name}")
            hook.step(report)

    def _is_sound(self, report: StepReport) -> bool:
        """Whether what is now may be gone back to: no update has just been left out, and every weight is a number.

        Raises:
            NonFiniteLoss: after the last step, where a weight is none.
        """
        if self.guard.in_a_row and not report.last:
            return False
        if self.engine.weights_are_finite():
            return True
        what = f"a weight became infinite or no number by step {report.step}"
        if report.last:
            raise NonFiniteLoss(f"{what}; last good checkpoint: {self.last_good()}; {self.guard.advice}")
        log.warning("%s: no checkpoint is written of it, and nothing evaluated", what)
        return False

    def _roll_back(self, trouble: RollBack) -> int:
        """Returns the step of the checkpoint that the run has gone back to."""
        self.processes.note("going back to the latest checkpoint")
        batches = self.guard.batches | trouble.batches
        found = self.go_back(batches) if self.go_back is not None else None
        if found is None:
            every = self.config.train.checkpoint_every
            setting = f"train.checkpoint_every is {every}" if every else "set train.checkpoint_every"
            raise NonFiniteLoss(f"{trouble.what}; no checkpoint to go back to yet ({setting}); {self.guard.advice}")
        step, state = found
        self.guard.rolled_back(batches, state)
        self._unsettled.clear()
        self._updated.clear()
        self._put_off.clear()
        numbers = ", ".join(map(str, sorted(trouble.batches)))
        log.warning("%s: back to step %d, and on without global batch%s %s (%d of at most %d times)", trouble.what, step,
                    "es" if len(trouble.batches) > 1 else "", numbers, self.guard.rollbacks, self.config.guards.rollbacks)
        return step

    def train_step(self, step: int, stop: StopSignal) -> StepReport:
        started = time.perf_counter()
        report = StepReport(step, self._set_learning_rates(step), is_main=self.processes.is_main)
        # Phases share the step's batches; the i-th repeat of a phase takes the i-th of them.
        for repeat in range(self._batches_a_step):
            self.processes.note(f"step {step}, data")
            batches = self.loader.next_batch()
            self._batch = self.loader.batch
            report.data_wait_seconds += self.loader.wait_seconds
            report.data_digest = (report.data_digest + self.loader.digest()) % DIGEST_MODULUS
            due = [phase for phase in self.objective.phases if repeat < phase.repeats and step % phase.every == 0]
            for phase, count in zip(due, self._begin_counts(due, batches), strict=True):
                self._unsettled.append((report, self.run_phase(phase, step, batches, count)))
        self.processes.note(f"step {step}, averages")
        self.update_averages(step)
        self.processes.note(f"step {step}, agreeing")
        time_is_up = self.processes.is_main and any(hook.by_clock() for hook in self.hooks if hook.by_clock is not None)
        digest = self.processes.once(report.data_digest)
        number, report.data_digest, report.time_is_up = self._agree(stop.received or 0, digest, time_is_up)
        report.stopped = number > 0
        stop.agreed = signal.Signals(number) if number else None
        report.last = report.stopped or step == self.config.train.steps
        self._settle(report)
        report.seconds = time.perf_counter() - started
        return report

    def _begin_counts(self, phases: Sequence[Phase], batches: MicroBatches) -> list[Count]:
        """What phases count in their shares of a global batch, in one sum over the processes that nobody waits for yet: with a
        thousand processes there is always one that comes late."""
        sums = self.processes.begin_sum_of_numbers(*(sum(map(phase.count, batches)) for phase in phases))

        def count(index: int) -> int:
            return sums()[index]

        return [partial(count, index) for index in range(len(phases))]

    def run_phase(self, phase: Phase, step: int, batches: MicroBatches, count_of_all: Count | None = None) -> PhaseOutcome:
        """Freeze all other networks; loss and backward of each micro-batch; reduce, judge, clip, step; thaw.

        Args:
            count_of_all: gives what the phase counts in the global batch, where the sum is on its way already.

        Nothing in here waits for the device, but where an update can be left out by the host alone."""
        outcome: list[PhaseOutcome] = []
        on_device = self._runs_ahead and self.engine.skips_on_device(phase.network) and not self.guard.reads_losses
        left_out: bool | Tensor = False

        def leave_out(result: StepResult) -> bool | Tensor:
            nonlocal left_out
            outcome.append(PhaseOutcome(step, phase, totals, count, result, self.processes, self._batch))
            left_out = self.guard.leaves_out_on_device(outcome[0]) if on_device else self.guard.leaves_out(outcome[0])
            return left_out

        buffers = self._buffers.get(phase.network)
        if buffers is None:
            buffers = self._buffers[phase.network] = KeptBuffers(self.engine.moving_buffers(phase.network))
        buffers.keep()
        totals, count = self._accumulate(phase, step, batches, count_of_all)
        self.processes.note(f"step {step}, phase {phase.name}, step")
        self.engine.step(phase.network, leave_out)
        self.engine.train_only(None)  # DeepSpeed's stage 3 gives no state of a frozen parameter
        buffers.put_back(left_out)
        made = ~left_out if isinstance(left_out, Tensor) else not left_out
        self._updated[phase.network] = self._updated.get(phase.network, False) | made
        return outcome[0]

    def _rehearse(self, step: int) -> None:
        """Forward and backward of every phase, lazy ones too, with the loss times zero: what does not fit in memory, or does
        not compute, is found at once. Two micro-batches where a step has more than one, for the second is computed beside the
        gradients of the first; and beside as much memory as the optimizers' state will take. The next step is the one it would
        have been."""
        batches = self.loader.peek()[:2]
        with without_a_trace(self.engine), changes_are_declared(self.engine):
            state_to_come = [self.engine.optimizer_state_to_come(name) for name in self.engine.optimizers]
            for phase in self.objective.phases:
                self._accumulate(phase, step, batches, rehearsal=True)
                self.engine.step(phase.network, lambda result: True)
                self.engine.train_only(None)
            del state_to_come

    def _accumulate(self, phase: Phase, step: int, batches: MicroBatches, count_of_all: Count | None = None,
                    rehearsal: bool = False) -> tuple[dict[str, Tensor], int]:
        """Gradients of the phase's network, of the mean over the global batch; (sums by term on this rank, global count)."""
        engine, processes = self.engine, self.processes
        doing = f"{'the dry batch' if rehearsal else f'step {step}'}, phase {phase.name}"
        make_draws, scale = (Draws, 0.0) if rehearsal else (self.make_draws, 1.0)
        engine.train_only(phase.network, phase.second_order)
        networks = engine.view(phase.network)
        engine.training_mode(phase.network)
        engine.begin_update(phase.network)
        count_of_all = count_of_all or self._begin_counts([phase], batches)[0]
        totals: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            draws = make_draws(self.config.run.seed, phase.name, step, batch["sample"], processes.device)
            draws.rehearsal = rehearsal
            batch = {key: value if key == "sample" else value.to(processes.device, non_blocking=True)
                     for key, value in batch.items()}
            with engine.micro_batch(phase.network, last=index == len(batches) - 1):
                processes.note(f"{doing}, forward")
                with engine.forward_context():
                    terms = phase.loss(networks, batch, draws)
                # The terms are sums. Engines average gradients over processes, so the mean over the GLOBAL count needs
                # x world size.
                loss = reduce(add, (value for name, value in terms.items() if name not in phase.statistics))
                processes.note(f"{doing}, backward")
                engine.backward(phase.network, loss * (scale * processes.world_size / max(count_of_all(), 1)))
            for name, value in terms.items():
                total = value.detach().double()
                totals[name] = totals[name] + total if name in totals else total
        engine.end_update(phase.network)
        return totals, count_of_all()

    def _settle(self, report: StepReport) -> None:
        """Read what the steps came to, and let the guard judge.

        A GPU is given the next step before its last one is looked at, except where a hook wants to know."""
        wanted = report.last or bool(self._put_off) or any(hook.settled and hook.due(report) for hook in self.hooks)
        wanted = wanted or not self._runs_ahead
        ready = [each for each in self._unsettled if wanted or each[0] is not report]
        self._unsettled = [] if wanted else [each for each in self._unsettled if each[0] is report]
        for earlier, outcome in ready:
            self.guard.settle(outcome)
            earlier.metrics.update(self.metrics_of(outcome))

    def metrics_of(self, outcome: PhaseOutcome) -> dict[str, float]:
        """Its numbers under the names they are logged by; waits for the device."""
        prefix = f"{outcome.phase.name}/" if len(self.objective.phases) > 1 else ""
        norm, means, _ = outcome.read()
        metrics = {f"{prefix}{name}": mean for name, mean in means.items()}
        metrics.setdefault(f"{prefix}loss", outcome.loss())
        metrics[f"{prefix}grad_norm"] = norm
        if self.guard.left_out:
            metrics["skipped_steps"] = self.guard.left_out
        if self.guard.rollbacks:
            metrics["rollbacks"] = self.guard.rollbacks
        return metrics

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        """Set every network's learning rate; returns them by the names they are logged by."""
        optimizer = self.config.optimizer
        share = learning_rate_share(step, self.config.train.steps, self.config.schedule)
        peaks = {name: optimizer.lr_of.get(name, optimizer.lr) for name in self.engine.optimizers}
        for name, peak in peaks.items():
            self.engine.set_learning_rate(name, peak * share)
        if len(set(peaks.values())) == 1:  # not of the rates, which meet where the schedule ends in zero
            return {"learning_rate": next(iter(peaks.values())) * share}
        return {f"learning_rate/{name}": peak * share for name, peak in peaks.items()}

    def update_averages(self, step: int) -> None:
        """Once a step, after all phases, of the networks that one of them has trained (an update that was left out is none)."""
        train = self.config.train
        for name in self.engine.averages:
            repeats = [phase.repeats for phase in self.objective.phases if phase.network == name and step % phase.every == 0]
            updated = self._updated.pop(name, False)
            if repeats and updated is not False:
                samples = train.global_batch_size * max(repeats)
                share = average_decay(step, samples, train.ema_half_life, train.ema_ramp_up)
                decay: float | Tensor = share
                if isinstance(updated, Tensor):  # in fp64, so that 1 - decay is rounded as the host rounds it
                    decay = torch.where(updated, torch.full((), share, dtype=torch.float64, device=updated.device), 1.0)
                self.engine.update_average(name, decay)

    def _agree(self, stop: int, digest: int, time_is_up: bool) -> tuple[int, int, bool]:
        """All ranks stop alike, on the signal of the lowest rank that got one, go by the clock of rank 0, and share one ledger
        entry."""
        if self.processes.world_size == 1:
            return stop, digest, time_is_up
        total, stopping, up = self.processes.sum_of_numbers(digest, int(stop > 0), int(time_is_up))
        if stopping:
            stop = next(number for number in self.processes.gather(stop) if number)
        return stop, total % DIGEST_MODULUS, up > 0
