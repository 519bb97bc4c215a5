"""What one process has of a network's tensors: the pieces that it writes of a checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


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
    those that several processes have alike are dealt out among them, so that each is written once and all write about as
    much."""
    found: list[Piece] = []
    whole: list[tuple[str, Tensor]] = []
    replicated: dict[tuple[int, int], list[tuple[str, DTensor]]] = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if not is_sharded(tensor):
            whole.append((name, tensor))
        elif tensor.device_mesh.ndim == 1:
            found.append(_shard(name, tensor))
        else:
            groups, group = tensor.device_mesh.size(0), tensor.device_mesh.get_local_rank(0)
            replicated.setdefault((groups, group), []).append((name, tensor))
    for (groups, group), sharded in replicated.items():
        found += [_shard(name, tensor) for name, tensor in _dealt(sharded, groups, group)]
    found += [Piece(name, tuple(tensor.shape), 0, tensor) for name, tensor in _dealt(whole, world_size, rank)]
    return found


def _dealt(tensors: list[tuple[str, AnyTensor]], owners: int, owner: int) -> list[tuple[str, AnyTensor]]:
    """Those that are this owner's, of tensors by name that all owners have."""
    loads, mine = [0] * owners, []
    for name, tensor in sorted(tensors, key=lambda item: (-item[1].nbytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes
        if least == owner:
            mine.append((name, tensor))
    return mine


def _shard(name: str, tensor: DTensor) -> Piece:
    from torch.distributed.tensor import Replicate, Shard

    *others, placement = tensor.placements
    if placement != Shard(0) or others not in ([], [Replicate()]):
        raise NotImplementedError(f"{name}: a tensor placed as {tensor.placements}")
    shape, values, last = tuple(tensor.shape), tensor.to_local(), tensor.device_mesh.ndim - 1
    processes, place = tensor.device_mesh.size(last), tensor.device_mesh.get_local_rank(last)
    rows = -(-shape[0] // processes)  # of torch.chunk, which leaves the last processes less, or nothing
    begin = min(place * rows, shape[0])
    if values.shape[0] != min(rows, shape[0] - begin):
        raise RuntimeError(f"{name}: {values.shape[0]} of {shape[0]} rows on process {place}")
    return Piece(name, shape, begin * math.prod(shape[1:]), values)


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of local storage behind tensors (the local shard of a DTensor), each storage once."""
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storages[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(storages.values())
