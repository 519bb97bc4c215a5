"""What DeepSpeed ZeRO keeps and sends, on tensors without values: its own code reads values, which a plan has not.

Stages 1 and 2: the weights, in the precision they compute in, are views of one flat tensor for each group of parameters, padded
to twice the number of processes; each process has its part of it in fp32, with the optimizer's state. Stage 3: each process has
its part of every parameter, rounded up. Gradients go through a bucket, or two in turn where what is in one is sent while the
next are computed; gathered weights stay until 1e9 elements of them are alive. With `parallel.shard_size` neighbours keep a
second copy of what was gathered between them, until the next update, and gather from that.

What is sent is a copy of the bucket, which all processes of stages 1 and 2 sum up whole, in fp32. Stage 1 in bf16 is another
optimizer of DeepSpeed: the gradients of backward stay from one micro-batch to the next, and are added up in fp32, whole, all of
which is copied to be sent. What the optimizer takes is one more copy of this process's part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genscale.models.device_kind import on_gpu
from genscale.parallel.averages import Average, NamedAverage, copied_names
from genscale.parallel.engine import LeaveOut, MakeOptimizer, StepResult, never
from genscale.parallel.generating import cast_inputs
from genscale.parallel.gradients import clip_gradients, squared_norm
from genscale.parallel.materialise import Read, named_state, places_of, put
from genscale.parallel.pieces import tensor_bytes
from genscale.parallel.precision import DTYPES
from genscale.parallel.replicated import ReplicatedEngine
from genscale.parallel.torch_optimizers import state_tensors
from genscale.parallel.zero import LARGEST_BUCKET, LIVE, PERSISTENT, communication, neighbours


class PlannedZero(ReplicatedEngine):
    """Stage 1, 2 or 3 as far as memory and network are concerned.

    Attributes:
        flats: this process's part of the weights in fp32, by network and group of parameters.
        kept: its part of what the weights are computed with, by network: whole below stage 3.
        second: its part of the second copy, by network; it has storage from when weights are given back until the next update,
            that of a frozen network always.
        gives_back: whether weights are given back after a forward, and gathered once more for its backward.
        buckets: what stays allocated for the exchange of gradients, by network.
        whole_gradients: in fp32, of stage 1 in bf16.
        parts: of the gradients, of this process, of stage 3; they stay allocated.
    """

    def __init__(self, stage: int, waiting: Callable[[], Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting = waiting
        self.stage, self.whole_weights = stage, stage < 3
        self.flats: dict[str, list[Tensor]] = {}
        self.kept: dict[str, list[Tensor]] = {}
        self.second: dict[str, list[Tensor]] = {}
        self.buckets: dict[str, Tensor] = {}
        self.whole_gradients: dict[str, list[Tensor]] = {}
        self.parts: dict[str, list[Tensor]] = {}
        self._new: list[Tensor] = []
        self._sizes: dict[str, int] = {}
        self._sends_meanwhile = False
        self._bucket: Tensor | None = None
        self._filled, self._last, self.gives_back = 0, True, False
        self._wholes: dict[str, list[Tensor]] = {}
        self._copied: set[str] = set()

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        sent = communication(module, self.stage, "cuda" if on_gpu(next(module.parameters())) else "cpu")
        self._sizes[name], self._sends_meanwhile = sent["reduce_bucket_size"], sent.get("overlap_comm", True)
        optimizer = make_optimizer(module)
        groups = [group["params"] for group in optimizer.param_groups]
        self._flatten(name, module, groups)
        self.flats[name] = [torch.zeros(self._part(parameters)) for parameters in groups]
        for group, flat in zip(optimizer.param_groups, self.flats[name], strict=True):
            group["params"] = [flat]
        self.optimizers[name] = optimizer
        self.scalers[name] = torch.amp.GradScaler("cpu", enabled=False)
        if self.stage == 1 and self.precision != "fp32":  # DeepSpeed's BF16_Optimizer adds up whole gradients in fp32
            self.whole_gradients[name] = [torch.zeros(self._part(group) * self.processes.world_size) for group in groups]
        if self.stage == 3:
            self.buckets[name] = torch.empty(self._sizes[name])
            self.parts[name] = [torch.zeros_like(flat) for flat in self.flats[name]]
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: self._made(parameter))

    def _hold(self, name: str, module: nn.Module, read: Read | None) -> None:
        self._flatten(name, module, [list(module.parameters())])

    @cached_property
    def _neighbours(self) -> dist.ProcessGroup | None:
        return neighbours(self.settings, self.processes.world_size)

    def _part(self, parameters: list[nn.Parameter]) -> int:
        """Elements of a group that a process has."""
        world = self.processes.world_size
        if self.stage == 3:
            return sum(-(-parameter.numel() // world) for parameter in parameters)
        return -(-sum(parameter.numel() for parameter in parameters) // (2 * world)) * 2

    def _flatten(self, name: str, module: nn.Module, groups: list[list[nn.Parameter]]) -> None:
        places = {id(getattr(*where[0])): where for where in places_of(module)}
        self.kept[name] = []
        for parameters in groups:
            whole = torch.empty(max(self._part(parameters) * self.processes.world_size, sum(p.numel() for p in parameters)),
                                dtype=self._dtype)
            offset = 0
            for parameter in parameters:
                view = whole[offset:offset + parameter.numel()].view(parameter.shape)
                put(nn.Parameter(view, requires_grad=parameter.requires_grad), places[id(parameter)])
                offset += parameter.numel()
            self.kept[name].append(whole if self.stage < 3 else torch.empty(self._part(parameters), dtype=self._dtype))
            self._wholes.setdefault(name, []).append(whole)
            if self._neighbours is not None:
                copies = self.processes.world_size // self._neighbours.size()
                large = [parameter for parameter in parameters if parameter.numel() > PERSISTENT]
                self.second.setdefault(name, []).append(torch.empty(self._part(large) * copies, dtype=self._dtype))
        if self.precision != "fp32":
            module.register_forward_pre_hook(cast_inputs(self.precision), with_kwargs=True)
        self.modules[name] = self.networks[name] = module
        self._hold_second(name, name in self.frozen)

    def gathered(self) -> list[Tensor]:
        """Weights that are there for a forward alone, and second copies of them."""
        if self.stage < 3:
            return []
        second = [tensor for tensors in self.second.values() for tensor in tensors]
        return [*(parameter for module in self.modules.values() for parameter in module.parameters()), *second]

    @property
    def most_gathered(self) -> int | None:
        """Bytes of gathered weights that stay at most, beside second copies."""
        second = self._dtype.itemsize * sum(tensor.numel() for tensors in self.second.values() for tensor in tensors)
        return LIVE * self._dtype.itemsize + second if self.stage == 3 else None

    def on_host(self) -> list[Tensor]:
        """What offloading keeps off the device."""
        if self.settings.offload == "none":
            return []
        state = [tensor for optimizer in self.optimizers.values() for tensor in state_tensors(optimizer)]
        averages = [tensor for average in self.averages.values() for tensor in average.held()]
        return [*(tensor for tensors in (*self.flats.values(), *self.parts.values()) for tensor in tensors), *state, *averages]

    def _make_average(self, name: str) -> Average:
        module = self.modules[name]
        buffers = {key: tensor for key, tensor in named_state(module) if not isinstance(tensor, nn.Parameter)}
        flats = {f"flat {index}": flat for index, flat in enumerate(self.flats[name])}
        return NamedAverage({**flats, **buffers}, copied_names(module))

    def forward_context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _synchronise_gradients(self, name: str, last: bool) -> None:
        self._last = last
        if self.stage == 3:
            for each in self._wholes:
                self._hold_whole(each, True)
            self._gather_all(name)
            if self.gives_back:
                self._make_second()

    def _hold_whole(self, name: str, held: bool) -> None:
        """Of a network's weights, until a backward has gone through it; what it comes to last stays (embeddings)."""
        largest = max(parameter.numel() for parameter in self.modules[name].parameters())
        for whole in self._wholes[name]:
            numbers = whole.numel() if held else largest if whole.numel() >= largest else 0
            whole.untyped_storage().resize_(numbers * whole.element_size())

    def _hold_second(self, name: str, held: bool) -> None:
        (self._copied.add if held else self._copied.discard)(name)
        for part in self.second.get(name, ()):
            part.untyped_storage().resize_(part.numel() * part.element_size() if held else 0)

    def _make_second(self) -> None:
        for name in self.second:
            self._hold_second(name, True)

    def _gather_all(self, name: str) -> None:
        """From neighbours where there is a second copy, else from all processes."""
        among = self._neighbours if name in self._copied else None
        for whole, part in zip(self._wholes[name], (self.kept if among is None else self.second)[name], strict=True):
            dist.all_gather_into_tensor(whole[:len(part) * dist.get_world_size(among)], part, group=among)

    def skips_on_device(self, name: str) -> bool:
        return False

    def backward(self, name: str, loss: Tensor) -> None:
        whole = self.whole_gradients.get(name)
        if self.stage == 3:
            self._bucket = self.buckets[name]
        elif self._bucket is None and not whole:
            self._bucket = torch.empty(self._sizes[name] * (2 if self._sends_meanwhile else 1), dtype=self._dtype)
        if self.stage == 3 and self.gives_back:
            self._gather_all(name)
        loss.backward()
        if self.stage == 3:
            self._hold_whole(name, False)
            self._make_second()
        if self.stage == 1 and self._last and not whole:
            for parameter in self._parameters[name]:
                self._collect(name, parameter)
        self._send(name)
        if whole:
            self._add_up(name)
        for flat, new in zip(self.flats[name], self._new, strict=False):
            flat.grad = new if flat.grad is None else flat.grad.add_(new)
        self._new = []
        if self.stage > 1 or self._last:
            self._bucket = None

    @torch.no_grad()
    def _add_up(self, name: str) -> None:
        """Stage 1 in bf16: all of the gradients, which are summed over the processes after the last backward."""
        whole = self.whole_gradients[name]
        for parameter in self._parameters[name]:
            if parameter.grad is not None:
                whole[0][:parameter.numel()].add_(parameter.grad.flatten())
        if self._last:
            together = sum(map(len, whole)) <= LARGEST_BUCKET
            for sent in [torch.cat(whole)] if together else whole:
                with self.waiting():
                    dist.all_reduce(sent if together else sent.clone())

    def _made(self, parameter: nn.Parameter) -> None:
        """A gradient is there: it is sent at once from stage 2 on, and where that goes on meanwhile."""
        name = next(name for name, parameters in self._parameters.items() if any(each is parameter for each in parameters))
        if not self.whole_gradients.get(name) and (self.stage > 1 or (self._last and self._sends_meanwhile)):
            self._collect(name, parameter)

    @torch.no_grad()
    def _collect(self, name: str, parameter: nn.Parameter) -> None:
        """Put a gradient into the bucket, in whose place it is from now on, and send what was there if it is full."""
        if parameter.grad is None:
            return
        assert self._bucket is not None  # a backward is under way
        size = self._sizes[name]
        if self._filled + parameter.numel() > size:
            self._send(name)
        end = min(self._filled + parameter.numel(), size)
        self._bucket[self._filled:end].copy_(parameter.grad.flatten()[:end - self._filled])
        self._filled = end
        parameter.grad = None

    @torch.no_grad()
    def _send(self, name: str) -> None:
        """Reduce what is in the bucket; from it, each process keeps its part."""
        rows = self._filled // self.processes.world_size
        if not rows or self._bucket is None:
            return
        has_part = self.precision != "fp32" and all(flat.grad is not None for flat in self.flats[name])  # which is added to
        if self.stage < 3 and self.precision != "fp32" and not has_part and not self._new:
            self._new = [torch.zeros_like(flat) for flat in self.flats[name]]
        copy = self._bucket[:rows * self.processes.world_size].clone()
        with contextlib.nullcontext() if self._sends_meanwhile else self.waiting():
            if self.stage == 3:
                _ = None if on_gpu(copy) else copy.clone()  # gloo's own
                dist.reduce_scatter_tensor(copy[:rows], copy)
            else:
                dist.all_reduce(copy.float())
        del copy
        if self.stage < 3 and self.precision == "fp32" and not self._new:
            self._new = [torch.zeros_like(flat) for flat in self.flats[name]]
        self._filled = 0

    def step(self, name: str, leave_out: LeaveOut = never) -> StepResult:
        for number, flat in enumerate(self.flats[name]):
            if whole := self.whole_gradients.get(name):
                flat.grad = whole[number][:len(flat)]
            else:
                parts = self.parts.get(name)
                held = parts[number] if parts else flat.grad
                flat.grad = torch.zeros_like(flat) if held is None else held.clone()
                del held
        gradients = [flat.grad for flat in self.flats[name] if flat.grad is not None]
        result = StepResult(self.processes.sum(squared_norm(gradients)).sqrt())
        leave_out(result)
        clip_gradients(gradients, result.grad_norm, self.clip)
        self.optimizers[name].step()
        for flat, kept in zip(self.flats[name], self.kept[name], strict=True):
            part = kept[:len(flat)].copy_(flat)
            if self.stage < 3:
                dist.all_gather_into_tensor(kept, part)
            flat.grad = None
        for parameter in self._parameters[name]:
            parameter.grad = None
        self._hold_second(name, False)
        return result

    def bytes_at_rest(self) -> int:
        held = [tensor for average in self.averages.values() for tensor in average.held()]
        held += [tensor for optimizer in self.optimizers.values() for tensor in state_tensors(optimizer)]
        held += [tensor for flats in (*self.flats.values(), *self.kept.values()) for tensor in flats]
        held += [tensor for name in self.frozen for tensor in self.second.get(name, ())]
        return tensor_bytes(held) + sum(tensor_bytes(module.buffers()) for module in self.modules.values())
