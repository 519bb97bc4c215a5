"""Loss spikes: a loss that stands out from those of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128
"""Losses that the next one is compared with."""
FEWEST = 32
"""With fewer of them, nothing is a spike."""


class LossWindow:
    """The last losses of one phase, those of updates that were left out not among them."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def deviations(self, loss: float) -> float:
        """How many standard deviations the loss lies above the mean; minus infinity as long as there are too few to tell."""
        count = len(self._losses)
        if count < FEWEST:
            return -math.inf
        mean = math.fsum(self._losses) / count
        above = loss - mean
        deviation = math.sqrt(math.fsum([(each - mean) ** 2 for each in self._losses]) / count)
        return above / deviation if deviation else math.copysign(math.inf, above) if above else 0.0

    def state(self) -> list[float]:
        return list(self._losses)
