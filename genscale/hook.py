"""What a step did, and what is to be done about it: the hooks of a run, of which a user's are some more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from genscale.plugins import Plugins

HOOKS = Plugins("genscale.hooks", "hooks", "hook")
"""Those of installed packages, which a config chooses: classes that inherit from `Hook`."""


class Order(IntEnum):
    """Places in the order in which the hooks of a step run: the profiler sees steps, not what follows the last of them; a
    checkpoint comes after the evaluation that may make it the best, and after all that keeps its state in it."""

    SUPERVISE = 0
    PROFILE = 10
    COUNT = 20
    TRACE = 30
    LOG = 40
    EVALUATE = 50
    SAMPLE = 60
    USER = 70
    CHECKPOINT = 80


class Hook:
    """Something to do every so many steps, and after the last one. Subclass it for what keeps a state, acts on every process,
    or ends the run; `genscale.every` is enough for looking on.

    A hook is called on every process alike, so that it may take part in collectives, and must decide alike. What it
    raises ends the run, with its traceback.

    >>> import genscale
    >>> class Patience(genscale.Hook):
    ...     "Ends a run whose loss has not fallen for ten looks."
    ...     every, order = 20, genscale.Order.LOG  # before the evaluation and the sample that follow the last step
    ...     best, since = float("inf"), 0
    ...
    ...     def step(self, report):
    ...         self.best, self.since = min(self.best, report.metrics["loss"]), self.since + 1
    ...         self.since = 0 if self.best == report.metrics["loss"] else self.since
    ...         report.last = report.last or self.since == 10
    ...
    ...     def state(self):
    ...         return {"best": self.best, "since": self.since}
    ...
    ...     def load_state(self, state):
    ...         self.best, self.since = state["best"], state["since"]

    Attributes:
        every: steps between two calls (0: only after the last step).
        order: hooks run in ascending order of it, those alike as they were given.
        settled: only once the step's losses are known. Without it a GPU may still be at the step, and `metrics` is empty.
        sound: put off while updates are being left out, for the run may have to go back; not after the last step.
        by_clock: asked on rank 0 after each step; where it says so, the hook is due as well.
    """

    every: int = 1
    order: int = Order.USER
    settled: bool = True
    sound: bool = False
    by_clock: Callable[[], bool] | None = None

    @property
    def name(self) -> str:
        """Under which its state is kept in checkpoints, and by which it is called where it hangs."""
        return type(self).__name__

    def step(self, report: StepReport) -> None:
        """After a step at which it is due. Setting `report.last`, on every process, makes the step the run's last."""

    def state(self) -> dict[str, Any]:
        """What the hook must know again where a run goes on from a checkpoint, as JSON; rank 0's is kept. Called on every
        process, which may gather."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`: before the first step, and where the run goes back, of a checkpoint that has one of it."""

    def rolled_back(self, step: int) -> None:
        """The run has gone back to the checkpoint of that step: what came later is done again."""

    def close(self, failed: bool) -> None:
        """The run is over; where it failed, other processes may be gone."""

    def due(self, report: StepReport) -> bool:
        """Whether it runs after this step."""
        by_clock = self.by_clock is not None and report.time_is_up
        return report.last or by_clock or (self.every > 0 and report.step % self.every == 0)


def every(steps: int, f: Callable[[StepReport], object]) -> Hook:
    """Make a hook that calls `f(report)` every so many steps, and after the last one, on rank 0: to look on, not to act.

    `report.step` and `report.metrics` say what the step did: `loss` and other terms (`<phase>/loss` where a step has several
    phases), `grad_norm`, `learning_rate`, and `validation_<name>` where the step has been evaluated. They are plain floats,
    over the global batch of all processes.

    >>> import genscale
    >>> hook = genscale.every(50, lambda report: print(report.step, report.metrics["loss"]))

    Raises:
        ValueError: there are no so many steps.
    """
    if steps < 0:
        raise ValueError(f"genscale.every: {steps} steps; give a number of at least 0 (0: only after the last step)")
    return _Every(steps, f)


class _Every(Hook):
    def __init__(self, steps: int, f: Callable[[StepReport], object]) -> None:
        self.every, self.f = steps, f

    @property
    def name(self) -> str:
        return getattr(self.f, "__name__", type(self.f).__name__)

    def step(self, report: StepReport) -> None:
        if report.is_main:
            self.f(replace(report, metrics=dict(report.metrics)))


def hooks_by_name(hooks: Sequence[Hook]) -> dict[str, Hook]:
    """The hooks under the names by which a checkpoint keeps their states; several of one name are numbered, as they were given.

    Raises TypeError for what is no hook."""
    named: dict[str, Hook] = {}
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise TypeError(f"hooks: {hook!r} is no genscale.Hook; genscale.every(50, f) makes one of a function")
        names = (hook.name if number == 1 else f"{hook.name}-{number}" for number in range(1, len(hooks) + 1))
        named[next(name for name in names if name not in named)] = hook
    return named


@dataclass
class StepReport:
    """What one step did; losses are reduced over all ranks and normalised by global counts.

    Attributes:
        metrics: learning_rate (by network where they differ) and, once settled, losses by term and grad_norm; after an
            evaluation, what it found.
        data_digest: hash of the step's global samples, the same at any shape (the ledger).
        seconds, data_wait_seconds: of the step; waiting is part of it.
        last: no step follows, because the run is complete or was asked to stop, or because a hook has set it.
        time_is_up: what goes by the clock of rank 0 is due.
        is_main: this is rank 0's.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    data_digest: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    last: bool = False
    stopped: bool = False
    time_is_up: bool = False
    is_main: bool = True
