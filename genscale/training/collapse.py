"""The collapse watch: a run whose validation loss falls apart is ended, or taken back to its best checkpoint."""

from __future__ import annotations

import math
from typing import Any

from genscale.errors import UserError, nearest_divisors
from genscale.settings.config import TrainSettings


class Collapsed(UserError):
    """The run has ended because its validation loss fell apart: a matter of settings, so one line for the user."""


def check_collapse(train: TrainSettings) -> None:
    """Raises UserError where `train.collapse` asks for evaluations or checkpoints that are not made."""
    if train.collapse == "ignore":
        return
    if not train.evaluate_every:
        raise UserError(f"train.collapse: {train.collapse} goes by the evaluations, and train.evaluate_every is 0; set it to "
                        f"the steps between them, as {max(1, train.steps // 20)}, or train.collapse to ignore")
    if train.collapse == "restore" and (not train.checkpoint_every or train.evaluate_every % train.checkpoint_every):
        near = nearest_divisors(train.evaluate_every, train.checkpoint_every or train.evaluate_every)
        raise UserError(f"train.checkpoint_every: {train.checkpoint_every} does not divide train.evaluate_every "
                        f"{train.evaluate_every}, so that the best evaluation may have no checkpoint, to which train.collapse "
                        f"restore goes back; nearest that do: {near}")


class CollapseWatch:
    """Goes by the validation losses of a run, one after the other.

    Args:
        state: what `state` gave when the checkpoint was written that the run continues from, or nothing.

    Attributes:
        bad: evaluations in a row that were too bad.
        collapses: how often that has been too many.
        best: lowest loss so far.
    """

    def __init__(self, train: TrainSettings, state: dict[str, Any] | None) -> None:
        self.train = train
        self.bad: int = (state or {}).get("bad", 0)
        self.collapses: int = (state or {}).get("collapses", 0)
        self.best: float | None = (state or {}).get("best")

    def state(self) -> dict[str, Any] | None:
        """What the verdicts to come depend on, as JSON; None where nothing is watched."""
        if self.train.collapse == "ignore":
            return None
        return {"bad": self.bad, "collapses": self.collapses, "best": self.best}

    def collapsed(self, loss: float) -> bool:
        """Take in the loss of an evaluation: whether it is the last of too many bad ones.

        Bad is a loss above `collapse_factor` times the best, or none (NaN). Of losses that are not above 0 a factor means
        nothing: with such a best, nothing is bad.
        """
        if self.train.collapse == "ignore":
            return False
        bad = self.best is not None and self.best > 0 and not loss <= self.train.collapse_factor * self.best
        self.bad = self.bad + 1 if bad else 0
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
        if self.bad < self.train.collapse_patience:
            return False
        self.collapses += 1
        return True

    def verdict(self, step: int, loss: float, best: str) -> str:
        """What to tell the user of a collapse. `best` says where to go on from."""
        train, many = self.train, self.bad > 1
        counted = f"for {self.bad} evaluations in a row" if many else "at this evaluation"
        return (f"train.collapse: the validation loss is {loss:.6g} at step {step}, and {counted} above train.collapse_factor "
                f"{train.collapse_factor:g} times the best, {self.best:.6g}; {best}")

    def forget(self) -> None:
        """The weights are others now: count anew."""
        self.bad = 0
