"""What an engine holds, by name: for checkpoints, whole or in this process's pieces, and for looks at it between the steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genscale.parallel.averages import Average, local
from genscale.parallel.materialise import Read, named_state
from genscale.parallel.pieces import Piece
from genscale.parallel.processes import Processes
from genscale.parallel.torch_optimizers import state_to_come

NamedTensors = Iterator[tuple[str, Tensor]]


class EngineState(ABC):
    """The half of an engine's contract that is about what there is, not about steps: networks, optimizers and averages.

    Attributes:
        whole_weights: every process holds every weight, so that a module can be called and differentiated by itself.
        modules: the plain networks.
        optimizers: of the networks that are trained.
        averages: of the networks that one is kept of.
    """

    whole_weights = True
    processes: Processes
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Average]
    _buffers: dict[str, list[Tensor]]  # by network

    @abstractmethod
    def _make_average(self, name: str) -> Average:
        """An average that begins as the network's weights."""

    def weights_are_finite(self) -> bool:
        """Whether every weight and average is a number. Collective."""
        held = [tensor for name in self.optimizers for tensor in self._held_weights(name)]
        held += [local(tensor) for average in self.averages.values() for tensor in average.held()]
        numbers = [tensor.detach() for tensor in held if tensor.is_floating_point() and tensor.numel()]
        finite = not numbers or bool(torch.stack(torch._foreach_norm(numbers, math.inf)).isfinite().all())
        return not sum(self.processes.sum_of_numbers(int(not finite)))

    def _held_weights(self, name: str) -> list[Tensor]:
        """This process's part of the network's fp32 weights."""
        return [local(parameter) for parameter in self.modules[name].parameters()]

    def moving_buffers(self, name: str) -> list[Tensor]:
        """The buffers that an update of the network may change besides its weights, and all its constants."""
        return self._buffers[name]

    def replicas(self, name: str) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, name, tensor) of what every process has whole, and must have alike: buffers, and all that is not sharded of
        weights, average and optimizer state."""
        for key, tensor in named_state(self.modules[name]):
            if self.whole_weights or not isinstance(tensor, nn.Parameter):
                yield "network", key, tensor
        if name in self.averages:
            yield from (("average of", key, tensor) for key, tensor in self.averages[name].replicas())
        if name in self.optimizers:
            yield from (("optimizer of", key, tensor) for key, tensor in self._optimizer_replicas(name))

    def replicated_shards(self, name: str) -> Iterator[tuple[str, str, Tensor]]:
        """The same of what is sharded, and must be alike on the processes that hold the same `shard`."""
        return iter(())

    def _optimizer_replicas(self, name: str) -> NamedTensors:
        return iter(())

    @abstractmethod
    def network_state(self, name: str) -> NamedTensors:
        """Every parameter and persistent buffer in full and fp32, by name, on the CPU. Collective: every rank must
        exhaust it."""

    def load_network_state(self, name: str, read: Read) -> None:
        """The inverse of `network_state`, of a network that was prepared with other weights. Collective."""
        loaded = self._make_average(name)
        loaded.load([key for key, _ in named_state(self.modules[name])], read)
        loaded.keep()

    @abstractmethod
    def network_pieces(self, name: str) -> list[Piece]:
        """This process's pieces of what `network_state` gives. No process waits for another."""

    @abstractmethod
    def optimizer_pieces(self, name: str) -> list[Piece]:
        """This process's pieces of every optimizer tensor, "<state key>/<parameter name>" (`exp_avg/...`), and of its counters,
        "step/..."."""

    def clear_optimizer_state(self, name: str) -> None:
        """As before the first step."""
        self.optimizers[name].state.clear()

    def optimizer_state_to_come(self, name: str) -> list[Tensor]:
        """New tensors as large as the optimizer state that the network's first step will make, to rehearse with."""
        return state_to_come(self.optimizers[name])

    @abstractmethod
    def load_optimizer_state(self, name: str, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """The inverse of `optimizer_pieces`, after `prepare` with the network's weights loaded: `read(key)` gives the
        full tensor."""

    def average_pieces(self, name: str) -> list[Piece]:
        """This process's pieces of the average, in fp32, by the names of `network_state`."""
        return self.averages[name].pieces(self.processes.rank, self.processes.world_size)

    def load_average_state(self, name: str, keys: Iterable[str], read: Read) -> None:
        """The inverse of `average_pieces`: `read(key)` gives the full tensor."""
        self.averages[name].load(keys, read)

    def scaler_state(self, name: str) -> dict[str, Any]:
        """Loss-scaler state (JSON), empty without one."""
        return {}

    def load_scaler_state(self, name: str, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no loss scaler")

    @abstractmethod
    def bytes_at_rest(self) -> int:
        """Bytes this process holds between steps in weights, averages and optimizer state (not gradients, not activations)."""
