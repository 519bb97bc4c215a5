"""A hook in a package of its own."""

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeFloat, PositiveInt

import genscale


@dataclass
class Patience(genscale.Hook):
    """Ends a run whose loss has not fallen for some looks."""

    looks: PositiveInt = 3
    """Looks without a lower loss after which it ends."""
    by: NonNegativeFloat = 0.0
    """How much lower it must be."""

    order = genscale.Order.LOG  # before the evaluation and the checkpoint of the last step
    best, since = float("inf"), 0

    def step(self, report):
        loss = report.metrics["loss"]
        self.since = 0 if loss < self.best - self.by else self.since + 1
        self.best = min(self.best, loss)
        report.last = report.last or self.since == self.looks

    def state(self):
        return {"best": self.best, "since": self.since}

    def load_state(self, state):
        self.best, self.since = state["best"], state["since"]
