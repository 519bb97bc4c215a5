"""Exponential moving averages of a network's weights (Polyak and Juditsky 1992; with a half-life in samples as in Karras et al.
2020), held as the network itself is: by shard where it is sharded, in fp32 in every precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from genscale.models.moving_state import moving_buffers
from genscale.parallel.materialise import Read, fill_tensor, named_state
from genscale.parallel.pieces import Piece, is_sharded, pieces_of


class Average(ABC):
    """The average of one network's parameters and persistent buffers."""

    @abstractmethod
    def update(self, decay: float | Tensor) -> None:
        """average = decay * average + (1 - decay) * weights; 0 makes it the weights themselves. As a scalar on the device it
        need not be known to the host; 1 leaves the average as it is."""

    @abstractmethod
    def show(self) -> None:
        """Put the average in the network's place. Collective where the network is sharded."""

    @abstractmethod
    def hide(self) -> None:
        """Put the network's own weights back, bit for bit."""

    @abstractmethod
    def keep(self) -> None:
        """Make the average the network's own weights; it is of no use itself afterwards. Collective."""

    @abstractmethod
    def pieces(self, rank: int, world_size: int) -> list[Piece]:
        """This process's pieces of every tensor of the average, by the network's names."""

    @abstractmethod
    def load(self, keys: Iterable[str], read: Read) -> None:
        """The inverse of `pieces`: `read(key)` gives the full tensor."""

    @abstractmethod
    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """What every process has whole of it, by the network's names."""

    @abstractmethod
    def held(self) -> list[Tensor]:
        """The tensors this process holds for it."""


class NamedAverage(Average):
    """The average of tensors that keep their names: whole ones, or shards (DTensor).

    Args:
        tensors: by name; the very ones that the optimizer steps.
        copied: names of those that are taken over as they are.
    """

    def __init__(self, tensors: dict[str, Tensor], copied: set[str]) -> None:
        self.tensors = tensors
        self.averages = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.averaged = [name for name in tensors if name not in copied]
        self.copied = [name for name in tensors if name in copied]

    @torch.no_grad()
    def update(self, decay: float | Tensor) -> None:
        pairs = [(local(self.averages[name]), local(self.tensors[name])) for name in self.averaged]
        if pairs:
            lerp([a for a, _ in pairs], [w for _, w in pairs], 1 - decay)
        for name in self.copied:
            tensor = self.tensors[name]
            if isinstance(decay, Tensor):
                tensor = torch.where(decay < 1, tensor, self.averages[name])
            self.averages[name].copy_(tensor)

    @torch.no_grad()
    def show(self) -> None:
        # Contents, one tensor at a time, and not pointers: FSDP2 and DDP know the storages.
        for name, tensor in self.tensors.items():
            weights, average = local(tensor.detach()), local(self.averages[name])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    hide = show

    def keep(self) -> None:
        self.show()

    def pieces(self, rank: int, world_size: int) -> list[Piece]:
        return pieces_of(self.averages.items(), rank, world_size)

    def load(self, keys: Iterable[str], read: Read) -> None:
        for key in keys:
            fill_tensor(self.averages[key], read(key))

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self.averages.items() if not is_sharded(tensor))

    def held(self) -> list[Tensor]:
        return list(self.averages.values())


def lerp(averages: list[Tensor], weights: list[Tensor], share: float | Tensor) -> None:
    """Move averages towards the weights, in place."""
    torch._foreach_lerp_(averages, weights, [share.float()] * len(averages) if isinstance(share, Tensor) else share)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; it shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def copied_names(module: nn.Module) -> set[str]:
    """Names of the tensors that have no mean: whole numbers, and what a layer with moving state says is to be copied."""
    copied = {id(buffer) for buffer, rule in moving_buffers(module) if rule == "copied"}
    return {name for name, tensor in named_state(module) if not tensor.is_floating_point() or id(tensor) in copied}
