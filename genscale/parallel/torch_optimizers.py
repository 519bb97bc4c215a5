"""What engines know of torch's own optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genscale.parallel.averages import local


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


def skip_by_flag(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Step an optimizer whose kernels (torch's fused AdamW) leave everything as it is where the flag on the device is 1."""
    told: Any = optimizer  # what torch.amp.GradScaler sets on it is not declared
    told.found_inf = flag.float()
    try:
        optimizer.step()
    finally:
        del told.found_inf


def is_fused_adamw(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.AdamW and all(group.get("fused") for group in optimizer.param_groups)


def join_groups(optimizer: torch.optim.Optimizer) -> None:
    """Make one group of a fused AdamW's that are stepped alike, as all are without weight decay: each takes a call of its own.
    Before the first step."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if is_fused_adamw(optimizer) and all(each == settings[0] for each in settings):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.param_groups[:] = [{**settings[0], "params": parameters}]
