"""What a phase came to, read from the device only when somebody asks, so that the loop runs ahead of the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.objectives.base import Phase
from genscale.parallel.engine import StepResult
from genscale.parallel.processes import HostCopy, Processes


class PhaseOutcome:
    """Losses and gradient norm of one phase of one step, known before its update is made. Made on every rank together.

    Args:
        totals: sums over this rank's samples by term, on the device.
        count: what they are divided by, global.
        batch: number of the global batch, as the loader counts them.

    Attributes:
        spike: standard deviations by which the loss stands out, where the update was left out for that.
    """

    def __init__(self, step: int, phase: Phase, totals: dict[str, Tensor], count: int, result: StepResult,
                 processes: Processes, batch: int = 0) -> None:
        self.step, self.phase, self.names, self.scaled, self.processes = step, phase, list(totals), result.scaled, processes
        self.batch, self.spike = batch, 0.0
        local = torch.stack(list(totals.values()))
        means = processes.sum(local) / max(count, 1)
        self._numbers = torch.cat([result.grad_norm.to(local).reshape(1), means, local])
        self._copy = HostCopy(self._numbers)
        self._read: tuple[float, dict[str, float], dict[str, float]] | None = None
        self._loss: float | None = None

    def read(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """(gradient norm, global means by term, this rank's sums by term); waits for the device."""
        if self._read is None:
            norm, *values = (value + 0.0 for value in self._copy.read())  # -0 is logged as 0
            means, local = values[:len(self.names)], values[len(self.names):]
            self._read = norm, dict(zip(self.names, means, strict=True)), dict(zip(self.names, local, strict=True))
        return self._read

    def loss(self) -> float:
        """The global mean of what was minimised."""
        if self._loss is None:
            _, means, _ = self.read()
            self._loss = sum(mean for name, mean in means.items() if name not in self.phase.statistics)
        return self._loss

    def overflowed(self) -> bool:
        """Whether fp16's loss scaler has left the weights alone: the loss is a number, its scaled gradient is none."""
        return self.scaled and math.isfinite(self.loss()) and not math.isfinite(self.read()[0])

    def non_finite(self) -> bool:
        """Whether the loss or the gradient is no number; alike on every rank, for both are global."""
        return not math.isfinite(self.loss()) or (not self.scaled and not math.isfinite(self.read()[0]))

    def non_finite_flag(self) -> Tensor:
        """The same as a scalar, 1 or 0, on the device, without a loss scaler; nobody waits for it."""
        wanted = [0, *(index for index, name in enumerate(self.names, 1) if name not in self.phase.statistics)]
        return ~torch.stack([self._numbers[index] for index in wanted]).isfinite().all()

    def what(self) -> str:
        """What is wrong with it, where something is. Collective."""
        norm, _, local = self.read()
        if self.spike:
            return (f"{self.phase.name}/loss is {self.loss():.6g} at step {self.step}, {self.spike:.3g} standard deviations "
                    "above the mean of the last steps")
        by_rank = self.processes.gather(local)
        for name in self.names:
            bad = [rank for rank, terms in enumerate(by_rank) if not math.isfinite(terms[name])]
            if bad and name not in self.phase.statistics:
                ranks = f"rank{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))}"
                return f"{self.phase.name}/{name} became {by_rank[bad[0]][name]} at step {self.step} on {ranks}"
        return f"the gradient of {self.phase.network} became {norm} at step {self.step} (the loss was finite)"
