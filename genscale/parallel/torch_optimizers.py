"""What engines know of torch's own optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.parallel.averages import local
from genscale.parallel.gradients import clip_factor, clip_gradients


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def state_to_come(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """New tensors of the sizes of the state that the first step will make. Their memory is not written to."""
    return [torch.empty_like(local(parameter.detach())) for group in optimizer.param_groups for parameter in group["params"]
            if not optimizer.state.get(parameter) for _ in range(moments(group))]


def moments(group: Mapping[str, Any]) -> int:
    """Tensors of a parameter's size that the state of this parameter group has for each: two with `betas`, else one with
    momentum."""
    return 2 if "betas" in group else int(group.get("momentum", 0) > 0)


def step_clipped(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], norm: Tensor, clip: float,
                 left_out: Tensor | None = None) -> None:
    """Step with the gradients scaled down to a global norm of `clip` (0 = never).

    A GPU's fused AdamW scales each gradient as it reads it; elsewhere all are scaled before it: older runs go on in the same
    bits.

    Args:
        left_out: a flag on the device; where it is 1 the optimizer, which is a fused AdamW, leaves everything as it is.
    """
    if clip > 0 and gradients and gradients[0].is_cuda and is_fused_adamw(optimizer):
        step_told(optimizer, clip_factor(norm, clip), left_out)
        return
    clip_gradients(gradients, norm, clip)
    step_told(optimizer, left_out=left_out)


def step_told(optimizer: torch.optim.Optimizer, factor: Tensor | None = None, left_out: Tensor | None = None) -> None:
    """Step an optimizer whose kernels (torch's fused AdamW) multiply each gradient by a factor on the device, and leave
    everything as it is where a flag on the device is 1. Neither is read."""
    told: Any = optimizer  # what torch.amp.GradScaler sets on it is not declared
    told.grad_scale = None if factor is None else factor.reciprocal().float()  # which they divide by
    told.found_inf = None if left_out is None else left_out.float()
    try:
        optimizer.step()
    finally:
        del told.grad_scale, told.found_inf


def is_fused_adamw(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.AdamW and all(group.get("fused") for group in optimizer.param_groups)


def join_groups(optimizer: torch.optim.Optimizer) -> None:
    """Make one group of a fused AdamW's that are stepped alike, as all are without weight decay: each takes a call of its own.
    Before the first step."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if is_fused_adamw(optimizer) and all(each == settings[0] for each in settings):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.param_groups[:] = [{**settings[0], "params": parameters}]
