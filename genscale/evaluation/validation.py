"""The objective's metrics over the fixed validation set, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.objectives.base import Batch, Networks, Objective, Terms


@contextmanager
def evaluating(networks: Networks) -> Iterator[None]:
    """No gradients, and every network in evaluation mode; its own mode comes back afterwards."""
    modes = {name: network.training for name, network in networks.items()}
    try:
        for network in networks.values():
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for name, network in networks.items():
            network.train(modes[name])


def _collate(samples: list[dict[str, np.ndarray]], first: int, device: torch.device) -> Batch:
    batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])).to(device) for key in samples[0]}
    # Numbers stay on the host, as a training batch's do: draws are addressed by them.
    return {**batch, "sample": torch.arange(first, first + len(samples))}


class _Totals:
    """What the batches came to, each row filled in by one rank alone.

    The sum over ranks adds only zeros to a row, and the batches are then added in the same order everywhere. So the result has
    the same last digit for any number of ranks.
    """

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.sums: dict[str, Tensor] = {}  # by name: float64 (batches,)
        self.values: dict[str, Tensor] = {}  # by name: fp32 (samples, ...)

    def add(self, number: int, terms: Terms, own: bool) -> None:
        """Terms of batch `number`; of a batch that another rank has, only their shapes matter."""
        first = number * self.batch_size
        size = min(self.batch_size, self.samples - first)
        for name, value in terms.items():
            if value.dim() > 0 and len(value) != size:
                raise ValueError(f"{name}: {len(value)} values for a batch of {size} samples")
            if value.dim() == 0:
                kept = self.sums.setdefault(name, torch.zeros(-(-self.samples // self.batch_size), dtype=torch.float64))
                rows = slice(number, number + 1)
            else:
                kept = self.values.setdefault(name, torch.zeros(self.samples, *value.shape[1:]))
                rows = slice(first, first + size)
            if own:
                kept[rows] = value.detach().to("cpu", kept.dtype) + 0.0  # -0.0 would be 0.0 with a second rank only

    def joined(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """By name: the sum over all batches, or all samples' values on the CPU."""
        joined: dict[str, Any] = {}
        if self.sums:
            names = sorted(self.sums)
            table = reduce_sum(torch.stack([self.sums[name] for name in names], dim=1)).cpu()
            joined = dict(zip(names, table.sum(0).tolist(), strict=True))
        for name in sorted(self.values):  # one after the other: no second copy of all of them
            joined[name] = reduce_sum(self.values.pop(name)).cpu()
        return joined


def validate(objective: Objective, networks: Networks, samples: list[dict[str, np.ndarray]], *, batch_size: int, rank: int,
             world_size: int, device: torch.device, reduce_sum: Callable[[Tensor], Tensor],
             autocast: Callable[[], AbstractContextManager],
             on_batch: Callable[[int], object] | None = None,
             go_on: Callable[[int], bool] | None = None) -> dict[str, float] | None:
    """Metrics of `networks` over `samples`; every rank calls it and gets the same answer, whatever the number of ranks.

    Args:
        objective: says what to add up over a batch and what to make of the totals.
        networks: as the engine wrapped them.
        samples: the whole validation set, the same list on every rank; at least one.
        batch_size: samples in one forward pass.
        rank, world_size: rank r takes batches r, r + world_size, ...
        device: where the networks are.
        reduce_sum: a tensor (float64 or fp32) to its sum over all ranks, on every rank.
        autocast: the precision's context for a forward pass.
        on_batch: told after each batch of this rank how many samples it had.
        go_on: asked before each batch, with its number, by every rank alike; where it says no, the answer is None.
    """
    batches = [samples[start:start + batch_size] for start in range(0, len(samples), batch_size)]
    totals = _Totals(len(samples), batch_size)
    with evaluating(networks):
        # A sharded forward is collective, so a rank without a batch of its own left runs the last one and drops the result.
        for turn in range(rank, rank + -(-len(batches) // world_size) * world_size, world_size):
            if go_on is not None and not go_on(turn - rank):
                return None
            number = min(turn, len(batches) - 1)
            with autocast():
                terms = objective.evaluate(networks, _collate(batches[number], number * batch_size, device))
            totals.add(number, terms, own=turn < len(batches))
            if turn < len(batches) and on_batch is not None:
                on_batch(len(batches[turn]))
    return objective.summarise(totals.joined(reduce_sum))
