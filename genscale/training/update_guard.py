"""Updates that would do harm: found before they are made, left out, and taken back where leaving out does not help."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from genscale.errors import UserError
from genscale.parallel.processes import Processes
from genscale.settings.config import GuardSettings, TrainSettings
from genscale.training.non_finite import NonFiniteLoss
from genscale.training.phase_outcome import PhaseOutcome
from genscale.training.spikes import LossWindow

log = logging.getLogger("genscale")


class RollBack(NonFiniteLoss):
    """The run is to go back to its latest checkpoint, and on from there without some global batches. Where nobody takes it
    back, the error of a run that went wrong.

    Attributes:
        what: what went wrong.
        batches: numbers of the global batches, as the loader counts them.
    """

    def __init__(self, what: str, batches: Iterable[int], advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what, self.batches = what, frozenset(batches)


def check_guards(guards: GuardSettings, train: TrainSettings) -> None:
    """Raises UserError where a policy goes back to checkpoints that are not made."""
    if train.checkpoint_every or train.checkpoint_minutes:
        return
    for name in ("non_finite", "spikes"):
        if getattr(guards, name) == "rollback":
            raise UserError(f"guards.{name}: rollback goes back to the latest checkpoint, and train.checkpoint_every and "
                            f"train.checkpoint_minutes are 0; set train.checkpoint_every, say {max(1, train.steps // 20)}, or "
                            f"guards.{name} to skip")


class UpdateGuard:
    """Judges every update of a run; all ranks come to the same verdict.

    Args:
        settings: the `guards` section.
        global_batch_size: samples in a global batch.
        advice: what to try with a run that went wrong.
        last_good: says where the last good checkpoint is. Collective.
        state: what `state` gave when the checkpoint was written that the run goes on from.

    Attributes:
        left_out: updates that were not made.
        rollbacks: how often the run has gone back.
        batches: the global batches that are left out of the data since.
    """

    def __init__(self, settings: GuardSettings, global_batch_size: int, advice: str, processes: Processes,
                 last_good: Callable[[], str], state: dict[str, Any] | None = None) -> None:
        self.settings, self.global_batch_size, self.advice = settings, global_batch_size, advice
        self.processes, self.last_good = processes, last_good
        state = state or {}
        self.left_out: int = state.get("left_out", 0)
        self.rollbacks: int = state.get("rollbacks", 0)
        self.batches = frozenset(state.get("batches", ()))
        self._take_up(state)

    def _take_up(self, state: dict[str, Any]) -> None:
        self._rows: dict[str, list[int]] = {name: list(row) for name, row in state.get("rows", {}).items()}
        self._losses = {name: LossWindow(losses) for name, losses in state.get("losses", {}).items()}

    def state(self) -> dict[str, Any]:
        """What the verdicts to come and the data depend on, as JSON."""
        return {"left_out": self.left_out, "rollbacks": self.rollbacks, "batches": sorted(self.batches), "rows": self._rows,
                "losses": {name: window.state() for name, window in self._losses.items()}}

    @property
    def in_a_row(self) -> int:
        """Updates that were left out up to now, with none made between them; of the phase with the most."""
        return max(map(len, self._rows.values()), default=0)

    @property
    def reads_losses(self) -> bool:
        """Whether a verdict takes more than what the device can decide alone."""
        return self.settings.spikes != "ignore"

    def leaves_out(self, outcome: PhaseOutcome) -> bool:
        """Whether the update must not be made; waits for the device."""
        if outcome.non_finite():
            return True
        if self.reads_losses and not outcome.overflowed():
            deviations = self._window(outcome).deviations(outcome.loss())
            outcome.spike = deviations if deviations > self.settings.spike_deviations else 0.0
        return outcome.spike > 0

    def leaves_out_on_device(self, outcome: PhaseOutcome) -> Tensor:
        """The same, as a scalar that the host does not wait for."""
        return outcome.non_finite_flag()

    def settle(self, outcome: PhaseOutcome) -> None:
        """Take in what an update has come to, after it was made or left out.

        Raises:
            RollBack: the run is to go back.
            NonFiniteLoss: the run is to stop.
        """
        name = outcome.phase.name
        if outcome.overflowed():
            self.left_out += 1
            log.info("step %d: gradient overflow in fp16, update skipped (%d so far)", outcome.step, self.left_out)
            return
        if not outcome.spike and not outcome.non_finite():
            self._rows.pop(name, None)
            if self.reads_losses:
                self._window(outcome).add(outcome.loss())
            return
        what, policy = outcome.what(), self.settings.spikes if outcome.spike else self.settings.non_finite
        if policy == "stop":
            raise NonFiniteLoss(f"{what}; last good checkpoint: {self.last_good()}; {self.advice}")
        self.left_out += 1
        row = self._rows.setdefault(name, [])
        row.append(outcome.batch)
        if policy == "rollback" or len(row) > self.settings.skips:
            if len(row) > 1:
                what = f"{what}, the {_ordinal(len(row))} update of {outcome.phase.network} in a row to be left out"
            if self.rollbacks >= self.settings.rollbacks:
                raise NonFiniteLoss(f"{what}, after going back to a checkpoint {self.rollbacks} times (guards.rollbacks); last "
                                    f"good checkpoint: {self.last_good()}; {self.advice}")
            raise RollBack(what, row, self.advice)
        first = outcome.batch * self.global_batch_size
        log.warning("%s: the update of %s is left out (samples %d to %d; %d in a row, %d so far)", what, outcome.phase.network,
                    first, first + self.global_batch_size - 1, len(row), self.left_out)

    def rolled_back(self, batches: frozenset[int], state: dict[str, Any]) -> None:
        """The run has gone back to a checkpoint that holds `state` of this guard, and goes on without these batches."""
        self.batches |= batches
        self.rollbacks += 1
        self._take_up(state)
        self._rows = {}

    def _window(self, outcome: PhaseOutcome) -> LossWindow:
        return self._losses.setdefault(outcome.phase.name, LossWindow())


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
