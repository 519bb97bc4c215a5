"""What one process has of a network's tensors: the pieces that it writes of a checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a logical tensor. Over all processes the pieces of a tensor make it whole, and none overlaps another.

    Attributes:
        name, shape: of the logical tensor.
        first: its first element here, in the tensor's row-major order.
        values: the elements from there on, in any shape and on any device, which may be none; they share the engine's memory.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    values: Tensor

    @property
    def whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Without torch.distributed.tensor, which takes half a second to load, there is none."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def pieces_of(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> list[Piece]:
    """This process's pieces of tensors by name, which must be the same on every process: its shard of a sharded one (DTensor);
    those that every process has whole are dealt out, so that each is written once and all write about as much."""
    found: list[Piece] = []
    whole: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        if is_sharded(tensor):
            found.append(_shard(name, cast("DTensor", tensor.detach())))
        else:
            whole.append((name, tensor.detach()))
    loads = [0] * world_size
    for name, tensor in sorted(whole, key=lambda item: (-item[1].nbytes, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            found.append(Piece(name, tuple(tensor.shape), 0, tensor))
    return found


def _shard(name: str, tensor: DTensor) -> Piece:
    from torch.distributed.tensor import Shard

    (placement,) = tensor.placements
    if placement != Shard(0):
        raise NotImplementedError(f"{name}: a tensor placed as {placement}")
    mesh, shape, values = tensor.device_mesh, tuple(tensor.shape), tensor.to_local()
    rows = -(-shape[0] // mesh.size())  # of torch.chunk, which leaves the last processes less, or nothing
    begin = min(mesh.get_local_rank() * rows, shape[0])
    if values.shape[0] != min(rows, shape[0] - begin):
        raise RuntimeError(f"{name}: {values.shape[0]} of {shape[0]} rows on process {mesh.get_local_rank()}")
    return Piece(name, shape, begin * math.prod(shape[1:]), values)


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of local storage behind tensors (the local shard of a DTensor), each storage once."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())
