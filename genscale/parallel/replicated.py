"""single and ddp: every process holds all weights; gradients are averaged by DistributedDataParallel through Accelerate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from genscale.parallel.averages import Average, NamedAverage, copied_names
from genscale.parallel.engine import Engine, LeaveOut, MakeOptimizer, NamedTensors, StepResult, never
from genscale.parallel.gradients import clip_gradients, fill_gradients, squared_norm
from genscale.parallel.materialise import Read, named_state
from genscale.parallel.pieces import Piece, pieces_of, tensor_bytes
from genscale.parallel.precision import autocast
from genscale.parallel.torch_optimizers import is_fused_adamw, join_groups, state_tensors, step_clipped


class ReplicatedEngine(Engine):
    """One process, or DDP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scalers: dict[str, torch.amp.GradScaler] = {}

    @property
    def strategy(self) -> str:
        return "ddp" if self.processes.world_size > 1 else "single"

    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        self._hold(name, module, read)
        self.optimizers[name] = make_optimizer(module)
        join_groups(self.optimizers[name])
        if self.processes.world_size > 1:
            # Of weights with a dimension of one, whose strides are the same walk through memory written in two ways.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.networks[name] = self.processes.accelerator.prepare_model(module)
            _settle_buckets(self.networks[name], module)
        # One scaler a network: two optimizers that share one would undo each other's scale.
        self.scalers[name] = torch.amp.GradScaler(self.processes.device.type, enabled=self.precision == "fp16")

    def _make_average(self, name: str) -> Average:
        module = self.modules[name]
        return NamedAverage(dict(named_state(module)), copied_names(module))

    def forward_context(self) -> contextlib.AbstractContextManager:
        return autocast("fp32" if self._second_order else self.precision, self.processes.device)

    def _synchronise_gradients(self, name: str, last: bool) -> None:
        if self.processes.world_size > 1:
            wrapped = cast(DistributedDataParallel, self.networks[name])
            wrapped.require_backward_grad_sync = last  # what DDP.no_sync() sets; forward and backward both read it

    def backward(self, name: str, loss: Tensor) -> None:
        self.scalers[name].scale(loss).backward()

    def skips_on_device(self, name: str) -> bool:
        return is_fused_adamw(self.optimizers[name]) and not self.scalers[name].is_enabled()

    def step(self, name: str, leave_out: LeaveOut = never) -> StepResult:
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        fill_gradients(self._parameters[name])
        if self._second_order:
            self._average_gradients(self._parameters[name])
        scaler.unscale_(optimizer)
        self._show_gradients(name)
        gradients = [p.grad for p in self._parameters[name] if p.grad is not None]
        grad_norm = squared_norm(gradients).sqrt()
        result = StepResult(grad_norm, scaled=scaler.is_enabled())
        left_out = leave_out(result)
        if isinstance(left_out, Tensor):
            step_clipped(optimizer, gradients, grad_norm, self.clip, left_out)
        elif scaler.is_enabled():
            self._step_scaled(name, gradients, grad_norm, left_out)
        elif not left_out:
            step_clipped(optimizer, gradients, grad_norm, self.clip)
        for parameter in self._parameters[name]:  # as the optimizer's zero_grad does, without what that is wrapped in
            parameter.grad = None
        return result

    def _step_scaled(self, name: str, gradients: list[Tensor], grad_norm: Tensor, left_out: bool) -> None:
        scaler = self.scalers[name]
        if left_out:
            scaler.update(scaler.get_scale())  # forgets what it saw in these gradients, and keeps the scale
            return
        clip_gradients(gradients, grad_norm, self.clip)
        scaler.step(self.optimizers[name])
        scaler.update()

    def _gradient_pieces(self, name: str) -> Iterable[Piece]:
        gradients = ((key, parameter.grad) for key, parameter in self.modules[name].named_parameters()
                     if parameter.grad is not None)
        return pieces_of(gradients, self.processes.rank, self.processes.world_size)

    def _average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """What DDP does, whose forward a phase of the second order goes past."""
        if self.processes.world_size > 1:
            for parameter in parameters:
                parameter.grad = self.processes.sum(cast(Tensor, parameter.grad)).div_(self.processes.world_size)

    def network_state(self, name: str) -> NamedTensors:
        for key, tensor in named_state(self.modules[name]):
            yield key, tensor.detach().cpu()

    def network_pieces(self, name: str) -> list[Piece]:
        return pieces_of(named_state(self.modules[name]), self.processes.rank, self.processes.world_size)

    def optimizer_pieces(self, name: str) -> list[Piece]:
        return pieces_of(self._optimizer_replicas(name), self.processes.rank, self.processes.world_size)

    def _optimizer_replicas(self, name: str) -> NamedTensors:
        names: dict[Tensor, str] = {parameter: key for key, parameter in self.modules[name].named_parameters()}
        for parameter, state in self.optimizers[name].state.items():
            yield from ((f"{kind}/{names[parameter]}", value) for kind, value in state.items() if isinstance(value, Tensor))

    def load_optimizer_state(self, name: str, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        parameters = dict(self.modules[name].named_parameters())
        optimizer = self.optimizers[name]
        for key in keys:
            kind, parameter_name = key.split("/", 1)
            parameter, value = parameters[parameter_name], read(key)
            if kind != "step":
                # With the strides of the parameter: fused kernels take both for the same walk through memory.
                value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
            elif _capturable(optimizer):
                value = value.to(parameter.device)
            optimizer.state[parameter][kind] = value

    def scaler_state(self, name: str) -> dict[str, Any]:
        return dict(self.scalers[name].state_dict())

    def load_scaler_state(self, name: str, state: dict[str, Any]) -> None:
        if state:
            self.scalers[name].load_state_dict(state)

    def bytes_at_rest(self) -> int:
        held = [tensor for average in self.averages.values() for tensor in average.held()]
        held += [tensor for optimizer in self.optimizers.values() for tensor in state_tensors(optimizer)]
        return tensor_bytes(held) + sum(tensor_bytes([*module.parameters(), *module.buffers()])
                                        for module in self.modules.values())


def _settle_buckets(network: nn.Module, module: nn.Module) -> None:
    """Make DDP arrange its gradient buckets now, by a backward of zeros.

    It does so after its first backward otherwise, and sums of three or more processes depend in their last bit on where in a
    bucket a gradient stands: the first step after a resume would differ from the same step of the undisturbed run.
    """
    parameters = list(module.parameters())
    module.forward = lambda: torch.stack([p.sum() for p in parameters]).sum() * 0
    try:
        for _ in range(2):  # arranged anew at the start of the second forward, whose backward must then be finished too
            network().backward()
    finally:
        del module.forward
    for parameter in parameters:
        parameter.grad = None


def _capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps its step counters on the parameter's device (fused kernels do)."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
