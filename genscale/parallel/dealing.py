"""Tensors dealt out over the processes: each is drawn, or read from a file, by one of them, which sends it to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genscale.errors import UserError
from genscale.parallel.materialise import Read
from genscale.parallel.processes import Processes


def dealt(read: Read, shapes: Mapping[str, Sequence[int]], processes: Processes) -> Read:
    """Gives every process what `read` gives, which each calls for its share of the tensors alone. To ask it for a tensor is
    collective: every process asks for the same ones in the same order. Between two of these a process holds what it has read
    ahead, at most as many values as the largest tensor has; what it is given lies on its device. Single numbers (an optimizer's
    count of steps) are read by each, and stay where they are.

    Args:
        shapes: of all the tensors, about in the order in which they will be asked for.
    """
    return read if processes.world_size == 1 else _Dealt(read, shapes, processes)


class _Dealt:
    def __init__(self, read: Read, shapes: Mapping[str, Sequence[int]], processes: Processes) -> None:
        self._read, self._processes = read, processes
        sizes = {name: math.prod(shape) for name, shape in shapes.items() if shape}
        self._round_of = {name: names for names in rounds_of(sizes, processes.world_size) for name in names}
        self._mine: dict[str, Tensor] = {}
        self._waiting: dict[str, tuple[torch.Size, torch.dtype]] = {}
        """What some process has read and not yet sent."""

    def __call__(self, name: str) -> Tensor:
        if name not in self._round_of:
            return self._read(name)
        names, processes = self._round_of[name], self._processes
        if name not in self._waiting:
            self._read_round(names)
        shape, dtype = self._waiting.pop(name)
        if names[name] == processes.rank:
            tensor = self._mine.pop(name).to(processes.device).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=processes.device)
        processes.broadcast(tensor, names[name])
        return tensor

    def _read_round(self, names: Mapping[str, int]) -> None:
        """Every process reads its tensors of a round. Raises, on every process, what went wrong on any."""
        mistake: Exception | None = None
        try:
            self._mine |= {name: self._read(name).detach() for name, rank in names.items() if rank == self._processes.rank}
        except Exception as error:
            mistake = error
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in self._mine.items() if name in names}
        known = mistake is None or isinstance(mistake, (UserError, OSError))
        told = mistake if known else RuntimeError(f"{type(mistake).__name__}: {mistake}")
        for layouts, trouble in self._processes.gather((found, told)):
            if trouble is not None:
                raise mistake or trouble
            self._waiting |= layouts


def rounds_of(sizes: Mapping[str, int], processes: int) -> list[dict[str, int]]:
    """Divides tensors into rounds, in their order; each round says which process each of its tensors goes to, none of which
    gets more values in it than the largest tensor has.

    >>> rounds_of({"embedding": 40, "norm": 1, "up": 30, "down": 30}, 2)
    [{'embedding': 0, 'norm': 1, 'up': 1}, {'down': 1}]
    """
    most = max(sizes.values(), default=0)
    rounds: list[dict[str, int]] = []
    loads, totals = [0] * processes, [0] * processes
    for name, size in sizes.items():
        if not rounds or min(loads) + size > most:
            rounds.append({})
            loads = [0] * processes
        least = min(range(processes), key=lambda rank: (loads[rank], totals[rank]))
        rounds[-1][name] = least
        loads[least] += size
        totals[least] += size
    return rounds
