"""Muon: momentum whose matrices are made orthogonal before they are added to the weights, beside AdamW for all that is no
hidden matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

The scale is that of Liu et al. 2025, "Muon is scalable for LLM training" (section 2.2): an update has the root mean square that
AdamW's updates typically have, so that learning rate and weight decay mean the same for both and carry over from AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor

from genscale.parallel.materialise import shard_like
from genscale.parallel.pieces import is_sharded

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: the steepest slope at zero
ITERATIONS = 5
ADAMW_RMS = 0.2  # Liu et al.: root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, fused AdamW for the rest; one optimizer to its callers.

    Exact on sharded tensors (DTensor) too: each matrix is gathered in full for its own update, and state stays sharded. With
    several processes each makes its share of the matrices orthogonal, with the same bits as if it made all.

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
        given = sorted((each for each in group["params"] if each.grad is not None), key=lambda each: -each.numel())
        spread = dist.get_world_size() if dist.is_initialized() else 1
        for start in range(0, len(given), spread):
            matrices = given[start : start + spread]  # of about one size, for each process one
            for parameter, update in zip(matrices, self._updates(matrices), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        self.adamw.step()
        return loss

    def _updates(self, matrices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Of as many matrices as there are processes or fewer: each process makes one orthogonal and sends it to the others.
        Collective, as is to gather a sharded one; no process holds more than its own and another whole."""
        momenta = [self._momentum(parameter) for parameter in matrices]
        rank = dist.get_rank() if dist.is_initialized() else 0
        made = None
        for owner, momentum in enumerate(momenta):
            full = momentum.full_tensor() if is_sharded(momentum) else momentum
            if owner == rank:
                made = self._orthogonal(full, self.rows.get(matrices[owner]))
        for owner, momentum in enumerate(momenta):
            update = made if owner == rank and made is not None else \
                torch.empty(momentum.shape, dtype=momentum.dtype, device=momentum.device)
            if dist.is_initialized():
                dist.broadcast(update, owner)
            yield shard_like(update, momentum) if is_sharded(momentum) else update

    def _momentum(self, parameter: Tensor) -> Tensor:
        """What is to be made orthogonal: the gradient and its momentum, which moves, in Nesterov's form."""
        share, state = self.param_groups[0]["momentum"], self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = cast(Tensor, parameter.grad)
        return gradient.lerp(state["momentum_buffer"].lerp_(gradient, 1 - share), share)

    def _orthogonal(self, update: Tensor, rows: tuple[int, ...] | None) -> Tensor:
        parts = update.split(rows) if rows else (update,)
        return torch.cat([orthogonal(part, self.dtype).to(update.dtype) * (ADAMW_RMS * math.sqrt(max(part.shape)))
                          for part in parts])


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
