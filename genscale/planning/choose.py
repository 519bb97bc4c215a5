"""Other ways to do the same run: settings that change memory and time, and nothing that is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from genscale.errors import UserError
from genscale.families import family
from genscale.parallel.strategies import SHARDS_MOST
from genscale.planning.account import Machine
from genscale.planning.depth import NotForetold
from genscale.planning.plan import Plan, Terms, peak_with, plan_shaped, with_size
from genscale.settings.config import Config, ParallelSettings, Strategy, micro_batch_of

Goal = Literal["speed", "memory", "cost", "fewest-gpus"]
GOALS: tuple[Goal, ...] = get_args(Goal)
RECOMPUTED = ("none", "selective", "full")
"""Ever more is computed again, and ever less kept."""
FURTHER = ("reduce_gradients", "reshard_after_forward", "prefetch_blocks")
"""Settings of `parallel` that only one strategy heeds; beside another they are refused."""
SMALLEST_GAIN = 0.01
"""A way is better where it saves more than this share."""
Planner = Callable[[Config, Machine, Terms], Plan]
"""Plans a config on a machine. Raises UserError for what `genscale train` refuses."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the run.

    Attributes:
        changes: what makes it of the run that was asked about, value by flag without dashes.
    """

    plan: Plan
    changes: dict[str, str]

    @property
    def flags(self) -> str:
        """To paste behind the command."""
        return " ".join(f"--{name} {value}" for name, value in self.changes.items()) or "yours"


@dataclass(frozen=True)
class Choices:
    """What was looked at.

    Attributes:
        fitting: the ways that fit, best first; yours among them where it does.
        unfit: those that do not, or might not.
        left_out: how many ways there was no time for.
        unplanned: of each way that could be trained and cannot be planned, why.
    """

    goal: Goal
    yours: Candidate
    fitting: tuple[Candidate, ...]
    unfit: tuple[Candidate, ...]
    left_out: int
    unplanned: tuple[str, ...] = ()

    @property
    def better(self) -> tuple[Candidate, ...]:
        """Those that fit and are better than yours; all that fit, where yours does not."""
        if not self.yours.plan.fits:
            return self.fitting
        yours = self.yours.plan
        return tuple(each for each in self.fitting if gain(each.plan, yours, self.goal) > SMALLEST_GAIN)


def measure(plan: Plan, goal: Goal) -> tuple[float, ...]:
    """What is to be small. Of ways that are equal by the goal the faster one is better."""
    by_goal = {"speed": plan.seconds, "memory": plan.peak, "cost": plan.gpu_hours, "fewest-gpus": plan.machine.gpus}
    return by_goal[goal], plan.seconds, plan.peak


def gain(plan: Plan, other: Plan, goal: Goal) -> float:
    """Share by which the plan is better than the other one; below zero where it is worse."""
    own, others = measure(plan, goal)[0], measure(other, goal)[0]
    return 1 - own / others


class Chooser:
    """Looks for the ways to do a run.

    Args:
        yours: the run as it was asked about.
        goal: what is to be small.
        seconds: of computing, to look for; None: until all have been looked at.
        show: told of each plan that is made.
        planner: plans the others.
        each: seconds of computing that the plan of yours took: another one is not begun where so much is not left.
    """

    def __init__(self, yours: Plan, goal: Goal = "speed", seconds: float | None = None,
                 show: Callable[[Candidate], None] | None = None, planner: Planner | None = None, each: float = 0.0) -> None:
        self.yours = Candidate(yours, {})
        self.goal, self._show = goal, show
        self._planner = planner or plan_shaped
        # Losses that depend on which samples share a micro-batch: their number is part of what is computed.
        self._couples_samples = family(yours.config.model.family).blueprint(yours.config).objective.couples_samples
        self._ends = None if seconds is None else time.process_time() + seconds  # not the clock's: others may compute here
        self._longest = each
        self._seen: dict[tuple[Any, ...], Candidate | None] = {_identity(yours.config, yours.machine): self.yours}
        self._left_out: set[tuple[Any, ...]] = set()
        self._unplanned: list[str] = []

    def neighbours(self) -> Choices:
        """The ways that differ little from yours; where it does not fit, the nearest that does comes first."""
        yours, machine = self.yours.plan.config, self.yours.plan.machine
        if not self.yours.plan.fits:
            self.nearest_that_fits()
        for fewer in self._machines()[1:]:
            self._fitted(fewer)
        place = RECOMPUTED.index(yours.parallel.activation_checkpointing)
        faster, smaller = RECOMPUTED[:place + 1], RECOMPUTED[place:]
        first, last = (smaller, faster) if self.goal == "memory" else (faster, smaller)
        for recomputed in first:
            self._climb(replaced(yours, activation_checkpointing=recomputed), machine)
        for config in self._spreads(yours, machine):
            self._look(config, machine)
        for recomputed in last:
            self._climb(replaced(yours, activation_checkpointing=recomputed), machine)
        return self._choices()

    def search(self) -> Choices:
        """Every way: strategies x recomputation x micro-batches (x numbers of GPUs, where the goal leaves them open)."""
        for machine in self._machines():
            for spread in self._spreads(self.yours.plan.config, machine):
                for recomputed in RECOMPUTED:
                    self._walk(replaced(spread, activation_checkpointing=recomputed), machine)
        return self._choices()

    def nearest_that_fits(self) -> Candidate | None:
        """The way that changes least of yours and fits on the same machine, or else on a larger one; None where none does."""
        machine = self.yours.plan.machine
        if found := self._fitted(machine):
            return found
        for _ in range(4):
            each = min(2 * machine.gpus, max(machine.gpus_per_node, self.yours.plan.gpu.gpus_per_node))
            machine = replace(machine, gpus=2 * machine.gpus, gpus_per_node=each)
            if _samples(self.yours.plan.config) % machine.gpus:
                break
            if found := self._fitted(machine):
                return found
        return None

    def _fitted(self, machine: Machine) -> Candidate | None:
        """The first of ever less like yours that fits there: smaller micro-batches, recomputation, other strategies."""
        yours = self.yours.plan.config
        for base in [yours, plainly(yours, SHARDS_MOST), *self._spreads(yours, machine)]:
            for recomputed in dict.fromkeys([yours.parallel.activation_checkpointing, *RECOMPUTED]):
                found = self._descend(replaced(base, activation_checkpointing=recomputed), machine)
                if found is not None:
                    return found
        return None

    def _descend(self, config: Config, machine: Machine) -> Candidate | None:
        """With the largest micro-batch that fits, yours at most. Those that are far from it are not planned."""
        own = self._size_of(config, machine)
        found = self._look(with_size(config, own), machine)
        if found is None or found.plan.fits:
            return found
        for size in sorted((size for size in self._sizes(machine) if size < own), reverse=True):
            if peak_with(found.plan, size) <= found.plan.gpu.memory_bytes * (1 - found.plan.terms.spare):
                smaller = self._look(with_size(config, size), machine)
                if smaller is None or smaller.plan.fits:
                    return smaller
        return None

    def _climb(self, config: Config, machine: Machine) -> None:
        """The same with the largest micro-batch that fits, from yours up or down."""
        sizes, own = self._sizes(machine), self._size_of(config, machine)
        found = self._look(with_size(config, own), machine)
        if found is None or not found.plan.fits:
            self._descend(config, machine)
            return
        for size in sorted(size for size in sizes if size > own):
            if peak_with(found.plan, size) > found.plan.gpu.memory_bytes:
                return
            found = self._look(with_size(config, size), machine)
            if found is None or not found.plan.fits:
                return

    def _walk(self, config: Config, machine: Machine) -> None:
        """Each micro-batch from the smallest up to the first that does not fit: larger ones take more."""
        for size in sorted(self._sizes(machine)):
            found = self._look(with_size(config, size), machine)
            if found is None or found.plan.verdict == "does not fit":
                return

    def _look(self, config: Config, machine: Machine) -> Candidate | None:
        """The plan, made once; None for what would be refused, or where there is no time left."""
        key = _identity(config, machine)
        if key in self._seen:
            return self._seen[key]
        started = time.process_time()
        if self._ends is not None and started + self._longest > self._ends:
            self._left_out.add(key)
            return None
        try:
            planned = self._planner(config, machine, self.yours.plan.terms)
        except UserError as error:
            if isinstance(error, NotForetold):
                self._unplanned.append(str(error))
            self._seen[key] = None
            return None
        found = self._seen[key] = Candidate(planned, self._changes(planned))
        self._longest = max(self._longest, time.process_time() - started)
        if self._show is not None:
            self._show(found)
        return found

    def _changes(self, plan: Plan) -> dict[str, str]:
        """From yours to that plan. Its micro-batch is named wherever it, or the number of processes, is another."""
        yours, changes = self.yours.plan, {}
        for setting in fields(ParallelSettings):
            old, new = (getattr(each.config.parallel, setting.name) for each in (yours, plan))
            if new != old:
                changes[f"parallel.{setting.name}"] = "null" if new is None else str(new).lower()
        if plan.step.micro_batch_size != yours.step.micro_batch_size:
            changes["train.micro_batch_size"] = str(plan.step.micro_batch_size)
        if plan.machine.gpus != yours.machine.gpus:
            changes["gpus"] = str(plan.machine.gpus)
            if plan.machine.gpus_per_node != min(plan.machine.gpus, plan.gpu.gpus_per_node):
                changes["gpus_per_node"] = str(plan.machine.gpus_per_node)
        return changes

    def _machines(self) -> list[Machine]:
        """Yours, and where the goal leaves their number open those with fewer GPUs, each half of the one before."""
        machine = self.yours.plan.machine
        found = [machine]
        while self.goal in ("cost", "fewest-gpus") and machine.gpus % 2 == 0:
            gpus = machine.gpus // 2
            machine = replace(machine, gpus=gpus, gpus_per_node=min(gpus, machine.gpus_per_node))
            if gpus % machine.gpus_per_node:
                break
            found.append(machine)
        return found

    def _spreads(self, config: Config, machine: Machine) -> Iterator[Config]:
        """Every strategy, in groups of one node too, and with offload, whose time nobody plans, where memory is what is short;
        the planner refuses those that cannot be."""
        one_node = machine.gpus_per_node if 1 < machine.gpus_per_node < machine.gpus else None
        yield config
        for strategy in get_args(Strategy):
            if machine.gpus > 1:  # else there is nothing to spread
                yield plainly(config, strategy)
            if self.goal in ("memory", "fewest-gpus") or not self.yours.plan.fits:
                yield plainly(config, strategy, offload="cpu")
            if one_node is not None:
                yield plainly(config, strategy, shard_size=one_node)

    def _size_of(self, config: Config, machine: Machine) -> int:
        """Micro-batch size of the config on that machine: of those allowed the nearest below, or the smallest."""
        yours = self.yours.plan
        wanted = micro_batch_of(config.train) or yours.step.micro_batch_size
        if self._couples_samples:
            wanted = yours.step.micro_batch_size * yours.machine.gpus // machine.gpus
        return max((size for size in self._sizes(machine) if size <= wanted), default=min(self._sizes(machine), default=1))

    def _sizes(self, machine: Machine) -> list[int]:
        """Micro-batch sizes that are the same run, none within a factor of 1.5 of the next smaller one but yours."""
        yours, (share, rest) = self.yours.plan, divmod(_samples(self.yours.plan.config), machine.gpus)
        if rest:
            return []
        if self._couples_samples:
            return [share // yours.step.accumulation] if share % yours.step.accumulation == 0 else []
        found: list[int] = []
        for size in range(1, share + 1):
            if share % size == 0 and (not found or size >= 1.5 * found[-1] or size == yours.step.micro_batch_size):
                found.append(size)
        return found

    def _choices(self) -> Choices:
        seen = [candidate for candidate in self._seen.values() if candidate is not None]
        fitting = sorted((each for each in seen if each.plan.fits), key=lambda each: measure(each.plan, self.goal))
        unfit = sorted((each for each in seen if not each.plan.fits), key=lambda each: each.plan.peak)
        return Choices(self.goal, self.yours, tuple(fitting), tuple(unfit), len(self._left_out - self._seen.keys()),
                       tuple(self._unplanned))


def replaced(config: Config, **parallel: Any) -> Config:
    """With other settings of `parallel`."""
    return replace(config, parallel=replace(config.parallel, **parallel))


def plainly(config: Config, strategy: str, shard_size: int | None = None, offload: str = "none") -> Config:
    """Under another strategy, whose further settings are at their defaults; under the same one they stay."""
    others = {} if strategy == config.parallel.strategy else {name: getattr(ParallelSettings(), name) for name in FURTHER}
    return replaced(config, strategy=strategy, shard_size=shard_size, offload=offload, **others)


def _identity(config: Config, machine: Machine) -> tuple[Any, ...]:
    """Of a way to do the run: what tells it from the others."""
    settings = tuple(getattr(config.parallel, setting.name) for setting in fields(ParallelSettings))
    return settings, micro_batch_of(config.train) or _samples(config) // machine.gpus, machine.gpus


def _samples(config: Config) -> int:
    """Of a step, each counted for every process that reads it."""
    return config.train.global_batch_size * config.parallel.context
