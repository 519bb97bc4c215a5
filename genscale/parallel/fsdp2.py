"""fsdp2: weights, gradients and optimizer state are sharded by PyTorch's `fully_shard`, a block at a time.

Accelerate's own FSDP plugin is ignored on the CPU without a word, so `fully_shard` is called directly, on every device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from genscale.models.memory_format import set_memory_format
from genscale.models.network_parts import blocks_of
from genscale.parallel.averages import Average, NamedAverage, copied_names
from genscale.parallel.engine import Engine, LeaveOut, MakeOptimizer, NamedTensors, StepResult, never
from genscale.parallel.generating import inputs_cast, without_hooks
from genscale.parallel.gradients import fill_gradients, squared_norm
from genscale.parallel.materialise import (
    Read,
    check_fillable,
    fill,
    materialise,
    named_state,
    on_meta,
    places_of,
    put,
    shard_like,
)
from genscale.parallel.pieces import Piece, pieces_of, tensor_bytes
from genscale.parallel.precision import DTYPES
from genscale.parallel.torch_optimizers import is_fused_adamw, state_tensors, step_clipped

WHOLE_GRADIENTS = 2**30
"""Bytes of a network's gradients that every process may hold whole while it accumulates them."""


class ShardedEngine(Engine):
    """PyTorch FSDP2; over groups of `parallel.shard_size` processes, between which shards are replicated, where that is set."""

    whole_weights = False
    strategy = "fsdp2"
    _whole: str | None = None
    """The network that a phase of the second order holds gathered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reducing: dict[str, bool] = {}

    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        self._hold(name, module, read)
        self.optimizers[name] = make_optimizer(module)

    def _hold(self, name: str, module: nn.Module, read: Read | None) -> None:
        # A head's logits are often a view; no objective writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        device = self.processes.device
        mesh = self.mesh
        # Computation in the asked precision, gradients reduced in fp32; the shards themselves stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.precision], reduce_dtype=torch.float32) \
            if self.precision != "fp32" else MixedPrecisionPolicy()
        set_memory_format(module, torch.contiguous_format)  # fully_shard takes no other
        unborn = on_meta(module)
        if unborn:
            check_fillable(module)
        else:
            materialise(module, device)
        blocks = blocks_of(module)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.settings.reshard_after_forward)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        _prefetch(cast(list[FSDPModule], blocks), self.settings.prefetch_blocks)
        if unborn:
            tied = [places for places in places_of(module) if len(places) > 1]
            module.to_empty(device=device)  # shards only; through FSDP's own hook, which keeps track of them
            for places in tied:
                put(getattr(*places[0]), places)
        if read is not None:
            fill(module, read)
        # FSDP2 settles the precision of its reductions when it begins, from the weights that are then trained: left to the
        # first forward, a network that begins frozen would have its gradients summed in bf16.
        cast(FSDPModule, module)._get_fsdp_state()._lazy_init()
        self.modules[name] = self.networks[name] = module

    @cached_property
    def mesh(self) -> DeviceMesh:
        """One dimension, of all processes; or (groups, processes in a group), where neighbours by rank, and so of one machine,
        are a group."""
        world, size = self.processes.world_size, self._shard_size
        if size == world:
            return init_device_mesh(self.processes.device.type, (world,))
        return init_device_mesh(self.processes.device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))

    @property
    def _shard_size(self) -> int:
        return self.settings.shard_size or self.processes.world_size

    @property
    def shard(self) -> int:
        return self.processes.rank % self._shard_size

    def _make_average(self, name: str) -> Average:
        return ShardedAverage(self.modules[name])

    def train_only(self, name: str | None, second_order: bool = False) -> None:
        if len(self.modules) > 1:
            for module in self.modules.values():
                # After a forward without a backward a network still shows gathered weights; flags set on these would vanish
                # with them in the middle of an accumulation: a frozen network would train, or the trained one not.
                cast(FSDPModule, module).reshard()
        super().train_only(name, second_order)
        self._whole = None
        if second_order:
            assert name is not None  # a phase trains a network
            self._whole = name
            self._gather(self.modules[name])

    def _gather(self, module: nn.Module) -> None:
        """Keep the whole of every weight until the step: the second backward needs what the first would have given away, and
        its hooks, of which some never fire, must not decide when gradients are reduced."""
        for part in _wrapped_parts(module):
            self._keep_gathered(part, True, root=part is module)
            part.unshard()

    @contextlib.contextmanager
    def _gathered(self, name: str) -> Iterator[None]:
        parts = _wrapped_parts(self.modules[name])
        for part in parts:
            part.unshard()
        modules = cast(list[nn.Module], parts)  # each is both
        try:
            with without_hooks(self.modules[name], "torch.distributed"), inputs_cast(modules, self.precision):
                yield
        finally:
            if name != self._whole:
                for part in parts:
                    part.reshard()

    def _keep_gathered(self, part: FSDPModule, keep: bool, root: bool) -> None:
        if not root:  # which keeps its weights after a forward anyway
            part.set_reshard_after_forward(self.settings.reshard_after_forward and not keep, recurse=False)
        part.set_reshard_after_backward(not keep, recurse=False)

    def _reduce_gathered(self, module: nn.Module) -> None:
        """Average the whole gradients over the processes, keep this process's shards, and give the whole weights back (without
        that the next forward would compute with these instead of the stepped ones, without a word)."""
        fill_gradients(module.parameters())
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        for parameter in module.parameters():
            parameter.grad = None
        for part in _wrapped_parts(module):
            part.reshard()
            self._keep_gathered(part, False, root=part is module)
        for name, parameter in module.named_parameters():
            mean = self.processes.sum(cast(Tensor, gradients.pop(name))).div_(self.processes.world_size)  # filled above
            parameter.grad = shard_like(mean, cast(DTensor, parameter))

    def _synchronise_gradients(self, name: str, last: bool) -> None:
        reduces = last or self._reduces_every(name)
        cast(FSDPModule, self.modules[name]).set_requires_gradient_sync(reduces and not self._second_order)

    def _reduces_every(self, name: str) -> bool:
        """Found once for a network: it is asked for every micro-batch."""
        if name not in self._reducing:
            whole = 4 * sum(parameter.numel() for parameter in self._parameters[name])  # of all processes, in fp32
            asked = self.settings.reduce_gradients
            self._reducing[name] = whole > WHOLE_GRADIENTS if asked == "auto" else asked == "every_micro_batch"
        return self._reducing[name]

    def backward(self, name: str, loss: Tensor) -> None:
        loss.backward()

    def skips_on_device(self, name: str) -> bool:
        return is_fused_adamw(self.optimizers[name])

    def step(self, name: str, leave_out: LeaveOut = never) -> StepResult:
        if self._second_order:
            self._reduce_gathered(self.modules[name])
        fill_gradients(self.modules[name].parameters())
        self._show_gradients(name)
        gradients = [cast(DTensor, p.grad).to_local() for p in self.modules[name].parameters() if p.grad is not None]
        # Each group of processes has the whole between them.
        grad_norm = (self.processes.sum(squared_norm(gradients)) / (self.processes.world_size // self._shard_size)).sqrt()
        result = StepResult(grad_norm)
        left_out = leave_out(result)
        if isinstance(left_out, Tensor):
            step_clipped(self.optimizers[name], gradients, grad_norm, self.clip, left_out)
        elif not left_out:
            step_clipped(self.optimizers[name], gradients, grad_norm, self.clip)
        self.optimizers[name].zero_grad(set_to_none=True)
        return result

    def _gradient_pieces(self, name: str) -> Iterable[Piece]:
        gradients = ((key, parameter.grad) for key, parameter in self.modules[name].named_parameters()
                     if parameter.grad is not None)
        return pieces_of(gradients, self.processes.rank, self.processes.world_size)

    def network_state(self, name: str) -> NamedTensors:
        for key, tensor in named_state(self.modules[name]):
            yield key, _full(tensor)

    def network_pieces(self, name: str) -> list[Piece]:
        return pieces_of(named_state(self.modules[name]), self.processes.rank, self.processes.world_size)

    def optimizer_pieces(self, name: str) -> list[Piece]:
        names: dict[Tensor, str] = {parameter: key for key, parameter in self.modules[name].named_parameters()}
        tensors = [(f"{kind}/{names[parameter]}", value) for parameter, state in self.optimizers[name].state.items()
                   for kind, value in state.items() if isinstance(value, Tensor)]
        return pieces_of(tensors, self.processes.rank, self.processes.world_size)

    def load_optimizer_state(self, name: str, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        parameters = dict(self.modules[name].named_parameters())
        optimizer = self.optimizers[name]
        for key in keys:
            kind, parameter_name = key.split("/", 1)
            parameter, value = parameters[parameter_name], read(key)
            if value.shape == parameter.shape and kind != "step":
                value = shard_like(value, cast(DTensor, parameter))
            elif any(group.get("fused") for group in optimizer.param_groups):
                value = value.to(parameter.device)
            optimizer.state[parameter][kind] = value

    def replicated_shards(self, name: str) -> Iterator[tuple[str, str, Tensor]]:
        if self._shard_size == self.processes.world_size:
            return
        yield from (("network", key, tensor) for key, tensor in named_state(self.modules[name]) if isinstance(tensor, DTensor))
        average = self.averages.get(name)
        for tensor in average.held() if average is not None else ():
            if isinstance(tensor, DTensor):
                yield "average of", f"shard {self.shard}", tensor
        for key, parameter in self.modules[name].named_parameters():
            for kind, tensor in self.optimizers[name].state[parameter].items() if name in self.optimizers else ():
                if isinstance(tensor, DTensor):
                    yield "optimizer of", f"{kind}/{key}", tensor

    def bytes_at_rest(self) -> int:
        held = [tensor for average in self.averages.values() for tensor in average.held()]
        held += [tensor for optimizer in self.optimizers.values() for tensor in state_tensors(optimizer)]
        return tensor_bytes(held) + sum(tensor_bytes([*module.parameters(), *module.buffers()])
                                        for module in self.modules.values())


class ShardedAverage(NamedAverage):
    """An average of shards. Weights that a network has gathered are given back when what they were gathered from changes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Of shards: a state dict gives back what is gathered.
        super().__init__(dict(named_state(module)), copied_names(module))

    def show(self) -> None:
        for part in _wrapped_parts(self.module):
            part.reshard()
        super().show()

    hide = show


def _prefetch(blocks: list[FSDPModule], ahead: int) -> None:
    """Have each block gather so many of those that follow it, in forward and in backward, before it computes."""
    if ahead:
        for index, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[index + 1:index + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(index - ahead, 0):index][::-1])


def _wrapped_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
