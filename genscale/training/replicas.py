"""What every process holds for itself must be the same on all: a checkpoint takes it from one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.models.moving_state import moving_buffers
from genscale.parallel.averages import local
from genscale.parallel.engine import Engine, named_state
from genscale.training.fingerprints import BLOCK, digest_of

SHOWN = 4
"""Names in a message at most."""


def compare_replicas(engine: Engine) -> None:
    """Compare, bit for bit by their digests, what a checkpoint takes whole from one process though each has its own: buffers;
    and where weights are not sharded, weights, averages and optimizer state. Waits for the device. Collective.

    Raises:
        UserError: a tensor differs; names the network, the tensor and the processes.
    """
    if engine.processes.world_size == 1:
        return
    held = [(shard, _digest_of_all(tensor for _, tensor in tensors)) for shard, tensors in _replicas(engine)]
    if all(_alike(same) for same in zip(*engine.processes.gather(held), strict=True)):
        return
    found = [(shard, *_digests(tensors)) for shard, tensors in _replicas(engine)]
    faults = []
    for same in zip(*engine.processes.gather(found), strict=True):
        for place, name in enumerate(same[0][1]):
            first: dict[int, int] = {}
            apart: dict[int, list[str]] = {}
            for rank, (shard, _, digests) in enumerate(same):
                against = first.setdefault(shard, rank)
                if digests[place] != same[against][2][place]:
                    apart.setdefault(against, []).append(str(rank))
            faults += [f"{name} (process{'es' if len(ranks) > 1 else ''} {', '.join(ranks)} against {against})"
                       for against, ranks in apart.items()]
    if not faults:
        return
    raise UserError(f"the processes have come apart, so no checkpoint is written: {_some(faults)}. A layer that changes its "
                    "buffers must sum what moves them over the processes (sum_over_processes of "
                    "genscale.models.moving_state.MovingState), and nothing may draw random numbers but from its draws")


def undeclared(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers that no layer declares to move; and the parameters that no gradient reaches, of a network that is
    trained."""
    moving = {id(buffer) for buffer, _ in moving_buffers(module)}
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return {name: tensor for name, tensor in named_state(module) if id(tensor) not in moving
            and (not isinstance(tensor, nn.Parameter) or (is_trained and not tensor.requires_grad))}


def has_undeclared(engine: Engine) -> bool:
    """Whether there is something that only a forward can show to be a constant, where that matters."""
    return engine.processes.world_size > 1 and any(undeclared(module) for module in engine.modules.values())


@contextmanager
def changes_are_declared(engine: Engine) -> Iterator[None]:
    """Around forwards in training, without updates: what changes in them must be what layers declare. Collective.

    Raises:
        UserError: a forward changes what no layer declares, and there are several processes, of which each would keep its own;
            or it puts another tensor in the place of one, anywhere.
    """
    spread = engine.processes.world_size > 1
    before = {name: dict(named_state(module)) for name, module in engine.modules.items()}
    constants = {name: undeclared(module) if spread else {} for name, module in engine.modules.items()}
    first = {name: _digests(tensors.items())[1] for name, tensors in constants.items()}
    yield
    changed, replaced = [], []
    for name, module in engine.modules.items():
        now = dict(named_state(module))
        replaced += [(name, key) for key, tensor in before[name].items() if now.get(key) is not tensor]
        after = _digests(constants[name].items())[1]
        changed += [(name, key) for key, one, other in zip(constants[name], first[name], after, strict=True) if one != other]
    # On some processes a forward may have found nothing to change.
    replaced = [each for found in engine.processes.gather(replaced) for each in found]
    changed = [each for found in engine.processes.gather(changed) for each in found]
    if replaced:
        raise UserError(f"{_described(engine, replaced)}: forward puts another tensor in its place, which nobody else sees; "
                        "change it in place (copy_, lerp_, add_)")
    if changed:
        raise UserError(f"{_described(engine, changed)}: forward changes it and the layer does not declare it, so each of the "
                        f"{engine.processes.world_size} processes would keep its own; {_way_out(engine, changed)}, or train in "
                        "one process")


def _replicas(engine: Engine) -> list[tuple[int, Iterator[tuple[str, Tensor]]]]:
    """What all processes hold alike, and what those do that hold the same shard: (shard, tensors by name)."""

    def named(find: Callable[[str], Iterator[tuple[str, str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
        return ((f"{kind} {name}.{key}", tensor) for name in engine.modules for kind, key, tensor in find(name))

    return [(0, named(engine.replicas)), (engine.shard, named(engine.replicated_shards))]


def _alike(held: Iterable[tuple[int, int]]) -> bool:
    """Whether each shard has one digest."""
    pairs = set(held)
    return len(pairs) == len({shard for shard, _ in pairs})


def _digest_of_all(tensors: Iterable[Tensor]) -> int:
    """One number for all. Small tensors are digested together, for a call costs more than they do."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    lengths: Counter[tuple[torch.dtype, torch.device]] = Counter()
    digests: list[Tensor] = []

    def digest(flat: Tensor) -> None:
        digests.append(digest_of(str(len(digests)), 0, _words(flat)))

    for tensor in tensors:
        flat = local(tensor.detach()).reshape(-1)
        kind = flat.dtype, flat.device
        some = waiting.setdefault(kind, [])
        some.append(flat)
        lengths[kind] += flat.numel()
        if lengths[kind] >= BLOCK:
            digest(torch.cat(some) if len(some) > 1 else flat)
            some.clear()
            lengths[kind] = 0
    for some in waiting.values():
        if some:
            digest(torch.cat(some))
    return hash(tuple(torch.stack([each.cpu() for each in digests]).tolist())) if digests else 0


def _words(flat: Tensor) -> Tensor:
    """The bits as words of 64, where they can be had without a copy: a digest takes half as long of these."""
    size = flat.element_size()
    fits = size < 8 and flat.is_contiguous() and not flat.numel() * size % 8 and not flat.storage_offset() * size % 8
    return flat.view(torch.int64) if fits else flat


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[int]]:
    """Names, and digests of what is held here, read together: each would make the host wait for a GPU."""
    names, digests = [], []
    for name, tensor in tensors:
        names.append(name)
        digests.append(digest_of(name, 0, local(tensor)))
    return names, torch.stack([digest.cpu() for digest in digests]).tolist() if digests else []


def _described(engine: Engine, found: list[tuple[str, str]]) -> str:
    names = []
    for network, key in dict.fromkeys(found):
        layer = engine.modules[network].get_submodule(key.rpartition(".")[0])
        names.append(f"network {network}, tensor {key} ({type(layer).__name__})")
    return _some(names)


def _way_out(engine: Engine, found: list[tuple[str, str]]) -> str:
    layers = [engine.modules[network].get_submodule(key.rpartition(".")[0]) for network, key in found]
    if all(isinstance(layer, nn.modules.batchnorm._NormBase) for layer in layers):
        return "take genscale.models.batch_norm.BatchNorm instead"
    return "derive the layer from genscale.models.moving_state.MovingState, which says how"


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return "; ".join(names[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
