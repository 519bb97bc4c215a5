"""fsdp2: weights, gradients and optimizer state are sharded by PyTorch's `fully_shard`, a block at a time.

Accelerate's own FSDP plugin is ignored on the CPU without a word, so `fully_shard` is called directly, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from genscale.parallel.engine import (
    Engine,
    MakeOptimizer,
    NamedTensors,
    StepResult,
    blocks_of,
    clip_gradients,
    squared_norm,
    state_tensors,
    tensor_bytes,
)
from genscale.parallel.materialise import Read, check_fillable, fill, named_state, on_meta, places_of, put, shard_like
from genscale.parallel.precision import DTYPES


class ShardedEngine(Engine):
    """PyTorch FSDP2."""

    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        device = self.processes.device
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        # Computation in the asked precision, gradients reduced in fp32; the shards themselves stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.precision], reduce_dtype=torch.float32) \
            if self.precision != "fp32" else MixedPrecisionPolicy()
        unborn = on_meta(module)
        if unborn:
            check_fillable(module)
        else:
            module.to(device)
        for block in blocks_of(module):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if unborn:
            tied = [places for places in places_of(module) if len(places) > 1]
            module.to_empty(device=device)  # shards only; through FSDP's own hook, which keeps track of them
            for places in tied:
                put(getattr(*places[0]), places)
        if read is not None:
            fill(module, read)
        self.modules[name] = self.networks[name] = module
        self.optimizers[name] = make_optimizer(module)

    def train_only(self, name: str | None) -> None:
        if len(self.modules) > 1:
            for module in self.modules.values():
                # After a forward without a backward a network still shows gathered weights; flags set on these would vanish
                # with them in the middle of an accumulation: a frozen network would train, or the trained one not.
                module.reshard()
        super().train_only(name)

    def _synchronise_gradients(self, name: str, last: bool) -> None:
        self.modules[name].set_requires_gradient_sync(last)

    def backward(self, name: str, loss: Tensor) -> None:
        loss.backward()

    def step(self, name: str) -> StepResult:
        gradients = [p.grad.to_local() for p in self.modules[name].parameters() if p.grad is not None]
        grad_norm = self.processes.sum(squared_norm(gradients)).sqrt()
        clip_gradients(gradients, grad_norm, self.clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return StepResult(grad_norm)

    def network_state(self, name: str) -> NamedTensors:
        for key, tensor in named_state(self.modules[name]):
            yield key, _full(tensor)

    def optimizer_state(self, name: str) -> NamedTensors:
        names = {parameter: key for key, parameter in self.modules[name].named_parameters()}
        for parameter, state in self.optimizers[name].state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{key}/{names[parameter]}", _full(value)

    def load_optimizer_state(self, name: str, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        parameters = dict(self.modules[name].named_parameters())
        optimizer = self.optimizers[name]
        for key in keys:
            kind, parameter_name = key.split("/", 1)
            parameter, value = parameters[parameter_name], read(key)
            if value.shape == parameter.shape and kind != "step":
                value = shard_like(value, parameter)
            elif any(group.get("fused") for group in optimizer.param_groups):
                value = value.to(parameter.device)
            optimizer.state[parameter][kind] = value

    def bytes_at_rest(self) -> int:
        return sum(tensor_bytes([*module.parameters(), *module.buffers(), *state_tensors(self.optimizers[name])])
                   for name, module in self.modules.items())


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
