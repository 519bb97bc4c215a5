"""`genscale train --audit N`: a few steps under watch, which prove that no phase touches a network it does not train, that
every term of a loss does something, that no two processes see the same sample, and that all hold the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from genscale.data.loader import StepLoader
from genscale.families import family
from genscale.hook import Hook
from genscale.inspection.audit_probe import Identity, copies, differing, fingerprints, identities, repeated, term_gradients
from genscale.inspection.audit_report import AuditReport, PhaseFindings
from genscale.interop.starting import complete_from, weights_from
from genscale.objectives.base import Objective, Phase
from genscale.parallel.engine import Engine
from genscale.parallel.gradients import squared_norm
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.launcher import follow_launcher
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine, plan_parallel
from genscale.settings.config import Config, GuardSettings
from genscale.supervise.signals import StopSignal
from genscale.tracking.run_logging import setup_logging
from genscale.training.phase_outcome import PhaseOutcome
from genscale.training.replicas import has_undeclared
from genscale.training.setup import averaged_networks, derive_accumulation, open_loader, open_objective, prepare
from genscale.training.trainer import Count, MicroBatches, Trainer


def audit(config: Config, steps: int) -> bool:
    """Watch the first steps of a run as configured, from its initial weights, and print a report (rank 0).

    Nothing is written to the run folder. Returns whether no fault was found, alike on every rank.

    Raises:
        UserError: as `train` does.
    """
    plan = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
    config = plan.settled(config)
    shape = derive_accumulation(config.train, plan.world_size, plan.context)
    clear_launch_environment()
    processes = Processes(need_group=plan.needs_group, context=plan.context)
    try:
        with tempfile.TemporaryDirectory(prefix="genscale-audit-") as folder:
            setup_logging(folder, processes.rank)
            report = _audit(config, min(steps, config.train.steps), processes, plan, shape)
        # Whoever ends with a fault ends the others too: not before it is told.
        processes.main_does(lambda: print(report.text(), flush=True))
        return not report.faults()
    finally:
        processes.close()


def _audit(config: Config, steps: int, processes: Processes, plan: ParallelPlan, shape: tuple[int, int]) -> AuditReport:
    micro_batch_size, accumulation = shape
    config, data_settings = processes.all_do(partial(complete_from, config))
    data = processes.all_do(lambda: family(config.model.family).build_data(data_settings, config.run.seed))
    loader = None
    try:
        objective = open_objective(config, processes, plan, data)
        engine = build_engine(plan, processes, config.parallel, config.train.precision, config.train.clip, micro_batch_size,
                              accumulation)
        averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
        pretrained = processes.all_do(lambda: weights_from(config.model))
        prepare(engine, objective, config.optimizer, averaged, None, pretrained)
        loader = open_loader(data, config.data, config.train.global_batch_size, micro_batch_size, processes)
        return AuditedTrainer(config, objective, engine, loader, steps, plan.strategy).watch()
    finally:
        if loader is not None:
            loader.close()
        data.close()


class AuditedTrainer(Trainer):
    """A trainer whose phases are watched: what they change, and what each of their terms does.

    Args:
        steps: to watch. Phases that would not run in them run in the last.
    """

    def __init__(self, config: Config, objective: Objective, engine: Engine, loader: StepLoader, steps: int,
                 strategy: str) -> None:
        objective.phases = [replace(phase, every=min(phase.every, steps)) for phase in objective.phases]
        self.watched = _WatchedLoader(loader)
        config = replace(config, guards=GuardSettings(non_finite="stop"))  # an update that was left out would tell nothing
        # A hook that wants to know makes the trainer look at each step's losses.
        super().__init__(config, objective, engine, self.watched, [Hook()],  # type: ignore[arg-type]
                         last_good=lambda: "none")
        self.steps = steps
        world = self.processes.world_size
        heading = (f"audit: {config.train.global_batch_size} samples a batch, {world} process{'es' if world > 1 else ''}, "
                   f"accumulation {engine.accumulation}, {strategy}, {config.train.precision}")
        self.report = AuditReport(heading, list(objective.networks), engine.whole_weights,
                                  {phase.name: PhaseFindings(phase) for phase in objective.phases})
        self._reached: dict[str, set[str]] = {name: set() for name in objective.networks}

    def watch(self) -> AuditReport:
        """Train, and tell."""
        with StopSignal() as stop:
            follow_launcher()
            if has_undeclared(self.engine):
                self._rehearse(1)
            for step in range(1, self.steps + 1):
                report = self.train_step(step, stop)
                self._look_at_samples(step)
                self.report.steps = step
                if report.stopped:
                    break
        if self.engine.whole_weights:
            for name in dict.fromkeys(phase.network for phase in self.objective.phases):
                keys = [key for key, _ in self.engine.modules[name].named_parameters()]
                self.report.untrained[name] = [key for key in keys if key not in self._reached[name]]
            for name in self.engine.modules:
                by_rank = self.processes.gather(copies(self.engine, name))
                unequal = [key for other in by_rank for key in differing(by_rank[0], other)]
                self.report.unequal[name] = list(dict.fromkeys(unequal))
        return self.report

    def run_phase(self, phase: Phase, step: int, batches: MicroBatches, count_of_all: Count | None = None) -> PhaseOutcome:
        findings = self.report.findings[phase.name]
        findings.runs += 1
        others = [name for name in self.engine.modules if name != phase.network]
        before = {name: fingerprints(self.engine, name) for name in others}
        if self.engine.whole_weights:
            self._measure(findings, term_gradients(self.engine, phase, self.config.run.seed, step, batches), batches)
        else:
            phase = replace(phase, loss=_noting_detached(phase, findings))
        outcome = super().run_phase(phase, step, batches, count_of_all)
        findings.total += outcome.read()[0]
        for name in others:
            changed = differing(before[name], fingerprints(self.engine, name))
            # A leak on any process is one.
            everywhere = [key for keys in self.processes.gather(changed) for key in keys]
            if everywhere:
                known = findings.leaks.setdefault(name, [])
                known += [key for key in dict.fromkeys(everywhere) if key not in known]
        return outcome

    def _measure(self, findings: PhaseFindings, gradients: Mapping[str, Mapping[str, Tensor]], batches: MicroBatches) -> None:
        """Add up the norms of the global gradient of each term."""
        phase, processes = findings.phase, self.processes
        (count,) = processes.sum_of_numbers(sum(phase.count(batch) for batch in batches))
        for term, by_key in gradients.items():
            norms = findings.norms.setdefault(term, dict.fromkeys(self.engine.modules, 0.0))
            own = []
            for key, parameter in self.engine.modules[phase.network].named_parameters():
                local = by_key.get(f"{phase.network}/{key}")
                total = processes.sum(parameter.detach().float() * 0 if local is None else local)
                own.append(total)
                # Not whether it is above zero: what samples do to the last bias of a hinge loss cancels exactly at the start.
                if sum(processes.sum_of_numbers(int(local is not None))):
                    self._reached[phase.network].add(key)
            norms[phase.network] += squared_norm(own).sqrt().item() / max(count, 1)
            for name in norms.keys() - {phase.network}:
                leaked = [gradient for key, gradient in by_key.items() if key.startswith(f"{name}/")]
                norms[name] += sum(processes.gather(squared_norm(leaked).item())) ** 0.5 / max(count, 1)

    def _look_at_samples(self, step: int) -> None:
        by_rank = self.processes.gather(self.watched.take())[::self.processes.part.of]  # those of a group have the same
        self.report.samples += sum(map(len, by_rank))
        self.report.repeats += [f"in step {step} {fault}" for fault in repeated(by_rank)]


def _noting_detached(phase: Phase, findings: PhaseFindings) -> Any:
    """The loss, which notes what can be seen of a term without a backward of its own: that it has no gradient at all."""

    def loss(*arguments: Any) -> dict[str, Tensor]:
        terms = phase.loss(*arguments)
        for name, term in terms.items():
            if name not in phase.statistics and not term.requires_grad:
                findings.norms.setdefault(name, {phase.network: 0.0})
        return terms

    return loss


class _WatchedLoader:
    """A loader that notes which samples it has given."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader
        self._seen: list[Identity] = []

    def next_batch(self) -> list[dict[str, Tensor]]:
        batches = self._loader.next_batch()
        self._seen += identities(batches)
        return batches

    def take(self) -> list[Identity]:
        """What it has given since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
