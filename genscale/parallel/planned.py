"""A process group of any size that is not there: what a step of one of its processes does can be traced on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from genscale.models.sequence_part import WHOLE, SequencePart
from genscale.parallel.engine import Engine
from genscale.parallel.pieces import is_sharded
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.settings.config import ParallelSettings

T = TypeVar("T")
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of DistributedDataParallel's buckets."""
CollectiveName = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all"]
NAMES: dict[str, CollectiveName] = {
    "c10d::_allgather_base_": "all_gather", "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::allgather_": "all_gather", "_c10d_functional::all_gather_into_tensor": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter", "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce", "c10d::broadcast_": "broadcast",
    "_c10d_functional::all_to_all_single": "all_to_all"}


@dataclass(frozen=True)
class Collective:
    """A collective of one process; `ranks` are those that take part."""

    name: CollectiveName
    bytes: int
    ranks: tuple[int, ...]


def collective_of(operation: Any, args: Any, out: Any) -> Collective | None:
    """Which collective a call is, if any."""
    name = NAMES.get(operation._schema.name)
    if name is None:
        return None
    ranks = tuple(dist.get_process_group_ranks(_group_of(args)))
    sizes = [sum(tensor.numel() * tensor.element_size() for tensor in tensors(arg)) for arg in (*args[:2], out)]
    return Collective(name, max(sizes), ranks)


def _group_of(args: Any) -> dist.ProcessGroup:
    if isinstance(args[-1], str):  # a sharded tensor's, which knows its group by name
        return dist.distributed_c10d._resolve_process_group(cast(Any, args[-1]))
    found = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    return dist.ProcessGroup.unbox(found)


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from tensors(each)


def is_local(kind: type) -> bool:
    """Whether tensors of this type are whole or this process's part: no DTensor, which asks for its part in turn."""
    return not (kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed"))


def is_gathering(operation: Any) -> bool:
    """Whether an operation prepares or ends the gathering of weights."""
    return operation._schema.name in ("fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy")


class PlannedProcesses(Processes):
    """Process 0 of a group of `world_size`, on the CPU, where nobody answers.

    Args:
        noted: is told what the process is at, as the watchdog would be.
        waiting: a context around a collective that computation waits for.
    """

    def __init__(self, world_size: int, noted: Callable[[str], None],
                 waiting: Callable[[], Any]) -> None:
        self.rank, self.world_size, self.device = 0, world_size, torch.device("cpu")
        self.doing, self.beats, self.writes, self.board, self._host_group = "", 0, 0, None, None
        self.accelerator: Any = SimpleNamespace(prepare_model=Replica)
        self._noted, self.waiting, self.part = noted, waiting, WHOLE

    def split_sequences(self, context: int) -> None:
        group = dist.new_group(list(range(context))) if context > 1 else None  # the others' are not asked for
        self.part = SequencePart(0, context, group)

    def note(self, doing: str) -> None:
        self._noted(doing)

    def sum(self, tensor: Tensor) -> Tensor:
        with self.waiting():
            return super().sum(tensor)

    def begin_sum_of_numbers(self, *numbers: int) -> Callable[[], list[int]]:
        return lambda: [number * self.world_size for number in numbers]

    def gather(self, value: T) -> list[T]:
        return [value] * self.world_size

    def close(self) -> None:
        """Nothing was opened here; see `fake_group`."""


class Replica(nn.Module):
    """What DistributedDataParallel does with memory and network: gradients are copied into buckets, which are reduced as they
    are full, and the gradients are views of them. (Its own C++ code reads values, which a plan has not.)"""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.require_backward_grad_sync = module, True
        self.buckets: list[Tensor] = []
        self._views: dict[nn.Parameter, tuple[int, Tensor]] = {}
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
        some: list[nn.Parameter] = []
        for parameter in parameters:
            some.append(parameter)
            limit = BUCKET if self.buckets else FIRST_BUCKET
            if sum(4 * each.numel() for each in some) >= limit:
                self._add_bucket(some)
                some = []
        if some:
            self._add_bucket(some)
        self._missing = [0] * len(self.buckets)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _add_bucket(self, parameters: list[nn.Parameter]) -> None:
        bucket = parameters[0].new_empty(sum(each.numel() for each in parameters), requires_grad=False)
        offset = 0
        for parameter in parameters:
            view = bucket[offset:offset + parameter.numel()].view(parameter.shape)
            self._views[parameter] = len(self.buckets), view
            offset += parameter.numel()
        self.buckets.append(bucket)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.require_backward_grad_sync:
            self._missing = [sum(place == index for place, _ in self._views.values()) for index in range(len(self.buckets))]
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def _ready(self, parameter: nn.Parameter) -> None:
        if not self.require_backward_grad_sync or parameter.grad is None or is_sharded(parameter):
            return
        index, view = self._views[parameter]
        if parameter.grad.untyped_storage()._cdata != view.untyped_storage()._cdata:
            view.copy_(parameter.grad)
            parameter.grad = view
        self._missing[index] -= 1
        if self._missing[index] == 0:
            dist.all_reduce(self.buckets[index])


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """Inside, this process is rank 0 of a group of so many, whose collectives do nothing.

    Raises:
        RuntimeError: this process is in a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a step cannot be planned in a process that is in a process group; plan it before, or elsewhere")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    whole, _fsdp_param._chunk_with_empty = _fsdp_param._chunk_with_empty, _first_chunk
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = whole
        dist.destroy_process_group()


def _first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """A parameter's part of rank 0 alone: FSDP2 makes those of all ranks and takes its own, which of thousands of ranks would
    be nearly all of the time that a plan takes."""
    size = tensor.shape[dim]
    return [tensor.narrow(dim, 0, min(size, -(-size // num_chunks)))]


def stood_in_for(strategy: str) -> tuple[str, ...]:
    """The categories of memory that are no trace of the code that runs: that of DDP and DeepSpeed reads values, so that models
    of it are traced (`planned_engine`)."""
    held = ("gradients", "exchange of gradients")
    return {"ddp": held, "zero": (*held, "gathered weights")}.get(strategy.rstrip("123"), ())


def planned_engine(plan: ParallelPlan, processes: PlannedProcesses, settings: ParallelSettings, precision: str,
                   *options: Any) -> Engine:
    """The engine of a plan; takes what `Engine` takes. That of ZeRO is one that keeps and sends what DeepSpeed would."""
    if plan.strategy.startswith("zero"):
        from genscale.parallel.planned_zero import PlannedZero

        return PlannedZero(int(plan.strategy.removeprefix("zero")), processes.waiting, processes, settings, precision, *options)
    engine = build_engine(plan, processes, settings, precision, *options)
    _ = getattr(engine, "mesh", None)  # made now, of numbers that a plan's tensors would not have
    return engine
