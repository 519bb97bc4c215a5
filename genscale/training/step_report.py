"""What a step did, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hook:
    """Something to do every so many steps, and after the last one (`every` 0: only then).

    Attributes:
        settled: only once the step's losses are known. Without it a GPU may still be at the step.
        sound: put off while updates are being left out, for the run may have to go back; not after the last step.
        by_clock: asked on rank 0 after each step; where it says so, the hook is due as well.
    """

    every: int
    action: Callable[[StepReport], None]
    settled: bool = True
    sound: bool = False
    by_clock: Callable[[], bool] | None = None

    def due(self, report: StepReport) -> bool:
        by_clock = self.by_clock is not None and report.time_is_up
        return report.last or by_clock or (self.every > 0 and report.step % self.every == 0)


@dataclass
class StepReport:
    """What one step did; losses are reduced over all ranks and normalised by global counts.

    Attributes:
        metrics: learning_rate (by network where they differ) and, once settled, losses by term and grad_norm.
        data_digest: hash of the step's global samples, the same at any shape (the ledger).
        seconds, data_wait_seconds: of the step; waiting is part of it.
        last: no step follows, because the run is complete or was asked to stop, or because a hook has set it.
        time_is_up: what goes by the clock of rank 0 is due.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    data_digest: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0
    last: bool = False
    stopped: bool = False
    time_is_up: bool = False
