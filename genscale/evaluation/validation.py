"""The objective's metrics over the fixed validation set, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from genscale.objectives.base import Batch, Networks, Objective


@contextmanager
def evaluating(networks: Networks):
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


def _collate(samples: list[dict[str, np.ndarray]], device: torch.device) -> Batch:
    return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])).to(device) for key in samples[0]}


def validate(objective: Objective, networks: Networks, samples: list[dict[str, np.ndarray]], *, batch_size: int, rank: int,
             world_size: int, device: torch.device, reduce_sum: Callable[[Tensor], Tensor],
             autocast: Callable[[], AbstractContextManager],
             on_batch: Callable[[int], object] | None = None) -> dict[str, float]:
    """Metrics of `networks` over `samples`; every rank calls it and gets the same answer, whatever the number of ranks.

    Args:
        objective: says what to add up over a batch and what to make of the totals.
        networks: as the engine wrapped them.
        samples: the whole validation set, the same list on every rank; at least one.
        batch_size: samples in one forward pass.
        rank, world_size: rank r takes batches r, r + world_size, ...
        device: where the networks are.
        reduce_sum: a float64 tensor to its sum over all ranks, on every rank.
        autocast: the precision's context for a forward pass.
        on_batch: told after each batch of this rank how many samples it had.
    """
    batches = [samples[start:start + batch_size] for start in range(0, len(samples), batch_size)]
    table: Tensor | None = None
    names: list[str] = []
    with evaluating(networks):
        # A sharded forward is collective, so a rank without a batch of its own left runs the last one and drops the result.
        for turn in range(rank, rank + -(-len(batches) // world_size) * world_size, world_size):
            with autocast():
                sums = objective.evaluate(networks, _collate(batches[min(turn, len(batches) - 1)], device))
            if table is None:
                names = sorted(sums)
                table = torch.zeros(len(batches), len(names), dtype=torch.float64, device=device)
            if turn < len(batches):
                table[turn] = torch.stack([sums[name].double() for name in names])
                if on_batch is not None:
                    on_batch(len(batches[turn]))
    # One row a batch, filled in by one rank alone: the sum over ranks adds only zeros to it, and the batches are then added
    # in the same order everywhere. So the result has the same last digit for any number of ranks.
    totals = reduce_sum(table).cpu().sum(0).tolist()
    return objective.summarise(dict(zip(names, totals, strict=True)))
