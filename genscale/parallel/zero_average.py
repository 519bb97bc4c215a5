"""The average of a network's weights under DeepSpeed ZeRO, whose fp32 weights are flat partitions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genscale.parallel.averages import Average, NamedAverage, copied_names, lerp
from genscale.parallel.materialise import Read, named_state
from genscale.parallel.pieces import Piece


class FlatEngine(Protocol):
    """What it takes of `zero.ZeroEngine`."""

    stage: int
    modules: dict[str, nn.Module]
    optimizers: dict[str, Any]

    def flat_partitions(self, name: str) -> list[Tensor]: ...
    def flat_attribute(self, name: str) -> str: ...
    def cut(self, name: str, flats: Sequence[Tensor]) -> list[Piece]: ...
    def inner(self, name: str) -> torch.optim.Optimizer: ...
    def link_optimizer_state(self, name: str) -> None: ...
    def set_full(self, parameter: nn.Parameter, full: Tensor, kind: str | None = None) -> None: ...


class FlatAverage(Average):
    """The average of this rank's flat fp32 partitions; buffers, which every rank has, keep their names."""

    def __init__(self, engine: FlatEngine, name: str) -> None:
        self.engine, self.name = engine, name
        self.weights = [flat.detach() for flat in engine.flat_partitions(name)]
        self.averages = [flat.clone() for flat in self.weights]
        module = engine.modules[name]
        buffers = {key: tensor for key, tensor in named_state(module) if not isinstance(tensor, nn.Parameter)}
        self.buffers = NamedAverage(buffers, copied_names(module))

    def update(self, decay: float | Tensor) -> None:
        lerp(self.averages, self.weights, 1 - decay)
        self.buffers.update(decay)

    def show(self) -> None:
        self._publish(self.averages)
        self.buffers.show()

    def hide(self) -> None:
        self._publish(self.weights)
        self.buffers.hide()

    def keep(self) -> None:
        for weights, average in zip(self.weights, self.averages, strict=True):
            weights.copy_(average)
        self.show()

    def _publish(self, flats: list[Tensor]) -> None:
        """Make the weights that forwards see those of the partitions, as DeepSpeed does after a step."""
        optimizer = self.engine.optimizers[self.name]
        if self.engine.stage == 3:
            optimizer.empty_partition_cache()
            for group, (shown, flat) in enumerate(zip(optimizer.fp16_partitioned_groups_flat, flats, strict=True)):
                shown.data.copy_(flat)
                optimizer._unflatten_partitioned_parameters(group)
            optimizer.invalidate_secondary_tensor()  # what neighbours share was made of other weights
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            return
        attribute = self.engine.flat_attribute(self.name)
        masters = getattr(optimizer, attribute)
        setattr(optimizer, attribute, flats)
        try:
            optimizer.update_lp_params()
        finally:
            setattr(optimizer, attribute, masters)

    def pieces(self, rank: int, world_size: int) -> list[Piece]:
        return [*self.engine.cut(self.name, self.averages), *self.buffers.pieces(rank, world_size)]

    def load(self, keys: Iterable[str], read: Read) -> None:
        parameters = dict(self.engine.modules[self.name].named_parameters())
        with self._as_optimizer_state():
            for key in keys:
                if key in parameters:
                    self.engine.set_full(parameters[key], read(key), "average")
                else:
                    self.buffers.load([key], read)

    @contextlib.contextmanager
    def _as_optimizer_state(self) -> Iterator[None]:
        """DeepSpeed finds the parts of a flat tensor by the parameters' names, if the optimizer has it in its state. AdamW does
        not bear a stranger there when it takes its first step."""
        inner = self.engine.inner(self.name)
        own = {flat: inner.state.pop(flat) for flat in self.engine.flat_partitions(self.name) if flat in inner.state}
        try:
            for flat, average in zip(self.engine.flat_partitions(self.name), self.averages, strict=True):
                inner.state[flat] = {"average": average}
            self.engine.link_optimizer_state(self.name)
            yield
        finally:
            for flat in self.engine.flat_partitions(self.name):
                del inner.state[flat]
            inner.state.update(own)
            self.engine.link_optimizer_state(self.name)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        return self.buffers.replicas()

    def held(self) -> list[Tensor]:
        return [*(piece.values for piece in self.engine.cut(self.name, self.averages)), *self.buffers.held()]
