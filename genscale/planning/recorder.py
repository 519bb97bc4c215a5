"""Everything that a step does, as it does it: operations, collectives, and the births and deaths of storages."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.parallel.averages import local
from genscale.parallel.planned import Collective, collective_of, is_gathering, is_local, tensors
from genscale.planning.account import Part
from genscale.planning.work import Work, work_of

RESIZE = torch.UntypedStorage.resize_
ASK_SHAPES = ShardingPropagator._propagate_tensor_meta_non_cached


class Moment(NamedTuple):
    """Where a step is.

    Attributes:
        region: before, in or after the repeated blocks of the network that is trained; "" in one that has none.
        layer: dotted name of the module.
    """

    phase: str = ""
    micro_batch: int = 0
    part: Part = "forward"
    region: str = ""
    layer: str = ""


@dataclass(eq=False)
class Storage:
    """A piece of memory."""

    bytes: int
    category: str
    moment: Moment


class Event(NamedTuple):
    """A birth, or (negative bytes) a death."""

    storage: Storage
    bytes: int
    moment: Moment


class Recorder(TorchDispatchMode):
    """Inside, all that torch is asked for is recorded; tensors may be fake or real.

    Attributes:
        events: births and deaths in their order.
        work: calls by (phase, micro-batch, part, head) and what they do.
        collectives: the same of collectives, and whether computation goes on meanwhile.
        watched: modules and their names, whose forwards say in which region and layer a step is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.work: dict[tuple[str, int, Part, bool], dict[Work, int]] = defaultdict(lambda: defaultdict(int))
        self.collectives: dict[tuple[str, int, Part], dict[tuple[Collective, bool], int]] = \
            defaultdict(lambda: defaultdict(int))
        self.watched: dict[nn.Module, tuple[str, str]] = {}
        self.moment, self.waits, self.counts = Moment(), False, True
        self._is_asking = False
        self._live: dict[int, Storage] = {}
        self._depth = 0
        self._hooks: list[Any] = []

    # --- where we are ----------------------------------------------------------------------------------------------------

    def at(self, **changes: Any) -> None:
        """From here on."""
        self.moment = self.moment._replace(**changes)

    @property
    def _part(self) -> Part:
        part = self.moment.part
        inside = torch._C._current_autograd_node() is not None
        if inside and ((part == "backward" and torch.is_grad_enabled()) or (part == "forward" and self._depth > 0)):
            return "recomputation"
        return part

    @property
    def is_head(self) -> bool:
        return self.moment.region == "after"

    def watch(self, network: nn.Module, blocks: list[nn.Module]) -> None:
        """Tell the regions and layers of a network's step apart, from here on."""
        self.watched = {module: (name, "in") for name, module in network.named_modules() if module in set(blocks)}
        if blocks:
            self.watched[network] = ("", "before")
        else:
            self.watched = {module: (name, "") for name, module in network.named_children()}
        self._last = blocks[-1] if blocks else None

    def _entering(self, module: nn.Module, _args: Any) -> None:
        self._depth += 1
        if module in self.watched and not self._in_backward():
            name, region = self.watched[module]
            self.at(layer=name, region=region)

    def _leaving(self, module: nn.Module, _args: Any, out: Any) -> None:
        self._depth -= 1
        if module not in self.watched or self._in_backward():
            return
        name, region = self.watched[module]
        if module is self._last:
            self.at(layer="", region="after")
        if region == "before":
            return
        for tensor in tensors(out):
            if tensor.requires_grad:  # its gradient is there: backward goes into the module
                tensor.register_hook(lambda _gradient, name=name, region=region: self._back_into(name, region))
        given = [tensor for tensor in tensors(_args) if tensor.requires_grad]
        if region == "in" and given:
            given[0].register_hook(lambda _gradient, name=name: self._back_out(name))

    def _back_into(self, name: str, region: str) -> None:
        self.at(layer=name, region=region)

    def _back_out(self, name: str) -> None:
        if self.moment.layer == name:
            self.at(layer="", region="before")

    def _in_backward(self) -> bool:
        return torch._C._current_autograd_node() is not None

    # --- storages --------------------------------------------------------------------------------------------------------

    def see(self, tensor: Tensor, category: str | None = None) -> None:
        """Note the tensor's storage where it is new; with a category, that it is of it in any case."""
        storage = tensor.untyped_storage()
        found = self._live.get(storage._cdata)
        if found is None:
            found = Storage(storage.nbytes(), category or self._category(), self.moment)
            self._live[storage._cdata] = found
            self.events.append(Event(found, found.bytes, self.moment))
            weakref.finalize(storage, self._die, storage._cdata, found)
        elif category is not None:
            found.category = category

    def _category(self) -> str:
        part = self._part
        if part in ("optimizer", "average") or not self.moment.phase:
            return "other"
        return "logits and loss" if self.is_head and part != "recomputation" else "activations"

    def _die(self, key: int, storage: Storage) -> None:
        if self._live.get(key) is storage:
            del self._live[key]
            self.events.append(Event(storage, -storage.bytes, self.moment))

    def _resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """FSDP2 gives gathered weights back by making their storage empty, and takes them up again."""
        out = RESIZE(storage, size)
        found = self._live.get(storage._cdata)
        if found is not None and found.bytes != size:
            self.events.append(Event(found, -found.bytes, self.moment))
            now = Storage(size, "gathered weights", self.moment)
            self._live[storage._cdata] = now
            self.events.append(Event(now, size, self.moment))
            weakref.finalize(storage, self._die, storage._cdata, now)
        return out

    def mark(self, held: Iterable[Tensor], category: str) -> None:
        """These tensors are of the category, since they were born."""
        for tensor in held:
            self.see(local(tensor), category)

    def keep_gradients(self) -> None:
        """What was made in backward and is still there is what backward is for."""
        for storage in self._live.values():
            if storage.moment.part == "backward" and storage.category not in ("gathered weights", "gradients"):
                storage.category = "gradients"

    # --- recording -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(map(is_local, types)):
            return NotImplemented  # a sharded tensor asks again for its part
        out = operation(*args, **(kwargs or {}))
        if self._is_asking:
            return out
        for tensor in tensors(out):
            self.see(tensor)
        collective = collective_of(operation, args, out)
        if collective is not None:
            self._exchanged(collective, args)
            return out
        if is_gathering(operation):
            self.mark(tensors([out, (kwargs or {}).get("out")]), "gathered weights")
        if self.counts and self.moment.phase:
            work = work_of(operation, args, out)
            if work is not None:
                self.work[self.moment.phase, self.moment.micro_batch, self._part, self.is_head][work] += 1
        return out

    def _exchanged(self, collective: Collective, args: Any) -> None:
        category = "gathered weights" if collective.name == "all_gather" else "exchange of gradients"
        is_sum = collective.name == "all_reduce" and self.waits  # of statistics
        is_of_activations = collective.name == "all_to_all"
        if not is_sum and not is_of_activations and self.moment.part != "optimizer":
            for tensor in tensors(args):
                storage = self._live.get(tensor.untyped_storage()._cdata)
                if storage is not None and storage.category not in ("weights", "gradients", "host memory"):
                    storage.category = category
        if self.moment.phase:
            hidden = not self.waits and not is_of_activations and self.moment.part in ("forward", "backward")
            place = self.moment.phase, self.moment.micro_batch, self.moment.part
            self.collectives[place][collective, hidden] += 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around all of it."""
        hooks = [nn.modules.module.register_module_forward_pre_hook(self._entering),
                 nn.modules.module.register_module_forward_hook(self._leaving, always_call=True)]

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            return self._resize(storage, size)

        def ask_shapes(propagator: ShardingPropagator, schema: Any) -> Any:
            """Torch 2.11 asks for the shapes of a sharded operation's results by whole tensors, which no run has."""
            self._is_asking = True
            try:
                return ASK_SHAPES(propagator, schema)
            finally:
                self._is_asking = False

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = ask_shapes  # type: ignore[assignment, method-assign]
        try:
            with self:
                yield
        finally:
            torch.UntypedStorage.resize_ = RESIZE  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = ASK_SHAPES  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()
