"""Networks built on the meta device (shapes without memory) get their tensors, and tensors their values, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genscale.parallel.pieces import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from genscale.parallel.processes import Processes

Read = Callable[[str], Tensor]
"""Name of a parameter or persistent buffer -> the full tensor on the CPU."""
Place = tuple[nn.Module, str]


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; a tied tensor once, under its first name, whatever the world size."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def on_meta(module: nn.Module) -> bool:
    """Whether any tensor of the network has no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def places_of(module: nn.Module) -> list[list[Place]]:
    """Where each parameter and buffer stands: (module, attribute), several for a tied one, the first in module order."""
    places: dict[int, list[Place]] = {}
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append((owner, name))
    return list(places.values())


def materialise(module: nn.Module, device: torch.device) -> None:
    """Move the network to the device, in place; tensors on the meta device get uninitialised memory. Tied ones stay tied.

    Raises:
        ValueError: a buffer on the meta device that no state dict holds, so that nobody could fill it.
    """
    check_fillable(module)
    # Module.to_empty would tear tied tensors apart.
    for places in places_of(module):
        owner, name = places[0]
        tensor = getattr(owner, name)
        if not tensor.is_meta:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
            continue
        real = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            real = nn.Parameter(real, requires_grad=tensor.requires_grad)
        put(real, places)


def without_values(module: nn.Module) -> None:
    """Move the network to the meta device, in place; tied tensors stay tied."""
    for places in places_of(module):
        tensor = getattr(*places[0])
        if not tensor.is_meta:
            meta = torch.empty_like(tensor, device="meta")
            put(nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta, places)


@torch.no_grad()
def begin_alike(module: nn.Module, processes: Processes, filled: bool = False) -> None:
    """Give every process what rank 0's network was constructed with, in place: one that has its memory already may have been
    drawn from a generator of each process's own. Collective; networks on the meta device are left as they are.

    Args:
        filled: parameters and persistent buffers are about to be set from a checkpoint, so that only the other buffers count.
    """
    if processes.world_size == 1:
        return
    known = {id(tensor) for _, tensor in named_state(module)} if filled else set()
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta and id(tensor) not in known]
    digest = hashlib.sha256()
    for tensor in held:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if len(set(processes.gather(digest.hexdigest()))) > 1:
        for tensor in held:
            tensor.copy_(processes.from_main(tensor))


def put(tensor: Tensor, places: list[Place]) -> None:
    """Set the tensor wherever it stands."""
    for owner, name in places:
        setattr(owner, name, tensor)


def check_fillable(module: nn.Module) -> None:
    """Raises ValueError for a buffer on the meta device that no state dict holds."""
    for owner in module.modules():
        for name in owner._non_persistent_buffers_set:
            if (buffer := owner._buffers[name]) is not None and buffer.is_meta:
                raise ValueError(f"{type(owner).__name__}.{name}: non-persistent buffer on the meta device: nothing fills it")


@torch.no_grad()
def fill(module: nn.Module, read: Read) -> None:
    """Set every parameter and persistent buffer to what `read` gives; of a sharded one (DTensor), this rank's shard."""
    for name, tensor in named_state(module):
        fill_tensor(tensor, read(name))


@torch.no_grad()
def fill_tensor(tensor: Tensor, full: Tensor) -> None:
    if full.shape != tensor.shape:  # copy_ would broadcast
        raise ValueError(f"{tuple(full.shape)} for a tensor of shape {tuple(tensor.shape)}")
    if is_sharded(tensor):
        tensor.to_local().copy_(shard_like(full, tensor).to_local())
    else:
        tensor.copy_(full)


def shard_like(full: Tensor, tensor: DTensor) -> DTensor:
    """This rank's shard of a full tensor that every rank has: nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
