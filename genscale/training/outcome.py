"""What a phase came to, read from the device only when somebody asks, so that the loop runs ahead of the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from genscale.objectives.base import Phase
from genscale.parallel.engine import StepResult
from genscale.parallel.processes import HostCopy, Processes
from genscale.training.guards import NonFiniteLoss


class PhaseOutcome:
    """Losses and gradient norm of one phase of one step. Made on every rank together.

    Args:
        totals: sums over this rank's samples by term, on the device.
        count: what they are divided by, global.
    """

    def __init__(self, step: int, phase: Phase, totals: dict[str, Tensor], count: int, result: StepResult,
                 processes: Processes) -> None:
        self.step, self.phase, self.names, self.scaled, self.processes = step, phase, list(totals), result.scaled, processes
        local = torch.stack(list(totals.values()))
        means = processes.sum(local) / max(count, 1)
        self._copy = HostCopy(torch.cat([result.grad_norm.to(local).reshape(1), means, local]))

    def read(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """(gradient norm, global means by term, this rank's sums by term); waits for the device."""
        norm, *values = self._copy.read()
        terms = len(self.names)
        return norm, dict(zip(self.names, values[:terms], strict=True)), dict(zip(self.names, values[terms:], strict=True))

    def skipped(self, last_good: Callable[[], str]) -> bool:
        """Whether fp16's loss scaler left the weights alone. The norm is global, so every rank answers alike.

        Raises:
            NonFiniteLoss: the loss or the gradient is no longer a number.
        """
        norm, _, local = self.read()
        if math.isfinite(norm):
            return False
        checkpoint = last_good()
        for rank, terms in enumerate(self.processes.gather(local)):
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise NonFiniteLoss(f"{self.phase.name}/{name} became {value} at step {self.step} on rank {rank}; last "
                                        f"good checkpoint: {checkpoint}; try a lower optimizer.lr, a longer "
                                        "schedule.warmup_steps, or train.precision bf16 instead of fp16")
        if self.scaled:
            return True
        raise NonFiniteLoss(f"the gradient of {self.phase.network} became {norm} at step {self.step} (the loss "
                            f"was finite); last good checkpoint: {checkpoint}; try a lower optimizer.lr or train.clip")
