"""Spectral norm as a parametrisation of a layer's weight."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genscale.models.moving_state import MovingState


class SpectralNorm(MovingState):
    """Divides a weight by its largest singular value (Miyato et al. 2018), as a parametrisation of it.

    One power iteration an update, in the first training forward after `begin_update`, not one a forward: second forwards,
    accumulation and recomputation see the same vectors, so that the update does not depend on how it was divided.
    """

    moving = {"u": "copied", "v": "copied"}  # of the weights as they are now: the mean of two unit vectors is none
    u: Tensor
    v: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("u", torch.empty(rows))
        self.register_buffer("v", torch.empty(columns))
        self._due = False

    def begin_update(self) -> None:
        self._due = True

    @property
    def is_due(self) -> bool:
        """Whether the next forward takes a step of the power iteration."""
        return self.training and self._due

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1).float()
            if self.is_due:
                self._due = False
                u, v = power_iteration(matrix.detach(), self.u, 1)
                self.u.copy_(u)
                self.v.copy_(v)
            largest = torch.dot(self.u, matrix @ self.v)
            return weight / largest.to(weight.dtype)


@torch.no_grad()
def power_iteration(matrix: Tensor, u: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors `(rows,)`, `(columns,)` of the largest singular value, `count` iterations nearer."""
    for _ in range(count):
        v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
        u = F.normalize(matrix @ v, dim=0, eps=1e-12)
    return u, v


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Put the layer's weight (output first) under `SpectralNorm`."""
    weight = layer.get_parameter("weight")
    rows = weight.shape[0]
    parametrize.register_parametrization(layer, "weight", SpectralNorm(rows, weight.numel() // rows), unsafe=True)
    return layer


@torch.no_grad()
def iterate_due(block: nn.Module) -> None:
    """Take the steps of the power iteration that the next forward of the block would take: it then does what one that is made a
    second time, in backward, does too."""
    for layer in block.modules():
        if not parametrize.is_parametrized(layer):
            continue
        for name, chain in cast(nn.ModuleDict, layer.parametrizations).items():
            if any(isinstance(step, SpectralNorm) and step.is_due for step in chain.children()):
                getattr(layer, name)  # which computes the weight
