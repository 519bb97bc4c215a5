"""Batch normalisation whose result does not depend on how a batch is spread over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genscale.models.moving_state import MovingState


class BatchNorm(MovingState):
    """Ioffe and Szegedy 2015, over `(batch, channels, ...)`, with the statistics of the batch of all processes. (torch's
    SyncBatchNorm runs on GPUs only.)

    Running statistics are kept in fp32. Only a training forward of a network that is being trained changes them, and
    recomputation in backward does not change them again (pytorch issue 96136). They follow every forward, as torch's do.
    """

    moving = {"running_mean": "averaged", "running_var": "averaged"}
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Under FSDP2 and ZeRO the weights may stand in bf16 beside statistics in fp32, which the kernel does not take.
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        if self.all_sum is None:
            return self._in_one_process(x, weight, bias)
        y, mean, variance, count = _GlobalBatchNorm.apply(x, weight, bias, self.eps, self.all_sum)
        if self.moves:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), self.momentum)
        return y

    def _in_one_process(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.may_be_recomputed:
            mean, variance = (self.running_mean, self.running_var) if self.is_trained else (None, None)
            return F.batch_norm(x, mean, variance, weight, bias, True, self.momentum, self.eps)
        # On copies: a recomputed forward must do the same operations, without that the statistics follow.
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, variance, weight, bias, True, self.momentum, self.eps)
        if self.moves:
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}"


def _by_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (like.ndim - 2))


class _GlobalBatchNorm(torch.autograd.Function):
    """Gradients as in nn.SyncBatchNorm: those of weight and bias are this process's own, which the engine averages."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
                all_sum: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        own_variance, own_mean = torch.var_mean(x.float(), dims, correction=0)
        own_mean, own_variance = own_mean.double(), own_variance.double()
        own_count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        sums = all_sum(torch.cat([own_count, own_count * own_mean, own_count * (own_variance + own_mean.square())]))
        count, (total, squares) = sums[0], sums[1:].chunk(2)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        mean, variance = mean.float(), variance.float()
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.all_sum = all_sum
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dims = [d for d in range(x.ndim) if d != 1]
        wide, centred = gradient.float(), x.float() - _by_channel(mean, x)
        own = torch.cat([wide.sum(dims), (wide * centred).sum(dims)])
        own_sum, own_product = own.chunk(2)
        of_weight = own_product * scale if ctx.needs_input_grad[1] else None
        of_bias = own_sum if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None
        mean_gradient, mean_product = (ctx.all_sum(own.double()) / count).float().chunk(2)
        of_x = (wide - _by_channel(mean_gradient, x) - centred * _by_channel(scale.square() * mean_product, x)) \
            * _by_channel(scale * weight, x)
        return of_x.to(x.dtype), of_weight, of_bias, None, None
