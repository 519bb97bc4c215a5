"""Muon: momentum whose matrices are made orthogonal before they are added to the weights, beside AdamW for all that is no
hidden matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

The scale is that of Liu et al. 2025, "Muon is scalable for LLM training" (section 2.2): an update has the root mean square that
AdamW's updates typically have, so that learning rate and weight decay mean the same for both and carry over from AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from genscale.parallel.materialise import shard_like
from genscale.parallel.pieces import is_sharded

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: the steepest slope at zero
ITERATIONS = 5
ADAMW_RMS = 0.2  # Liu et al.: root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, fused AdamW for the rest; one optimizer to its callers.

    Exact on sharded tensors (DTensor) too: each matrix is gathered in full for its own update, and state stays sharded.

    Args:
        matrices: hidden weight matrices, each with the rows of the matrices that stand on top of each other in it (query, key
            and value), which are made orthogonal one by one; None: it is one matrix.
        momentum: of the matrices, in Nesterov's form.
        dtype: of the matrix products that make a matrix orthogonal.
        adamw: parameter groups and options of the AdamW for all else.
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, tuple[int, ...] | None]], lr: float, weight_decay: float,
                 momentum: float, dtype: torch.dtype, adamw: list[dict[str, Any]], **options: Any) -> None:
        self.rows = {parameter: rows for parameter, rows in matrices if rows is not None}
        self.dtype = dtype
        self.adamw = torch.optim.AdamW(adamw, lr=lr, **options)
        hidden = [parameter for parameter, _ in matrices]
        group = {"params": hidden, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group, *self.adamw.param_groups], {})
        self.adamw.state = self.state  # one state, and (above) the same group dictionaries

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have gradients; what `closure` gives, which may compute the loss and these anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            update = self._orthogonal(parameter.grad.lerp(momentum, group["momentum"]), self.rows.get(parameter))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])
        self.adamw.step()
        return loss

    def _orthogonal(self, update: Tensor, rows: tuple[int, ...] | None) -> Tensor:
        full = update.full_tensor() if is_sharded(update) else update
        parts = full.split(rows) if rows else (full,)
        made = torch.cat([orthogonal(part, self.dtype).to(full.dtype) * (ADAMW_RMS * math.sqrt(max(part.shape)))
                          for part in parts])
        return shard_like(made, update) if is_sharded(update) else made


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, in `dtype`: singular values near 1 (0.7 to 1.2), by five steps
    of a Newton-Schulz iteration of fifth degree (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T
