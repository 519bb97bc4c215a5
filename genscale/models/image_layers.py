"""What image networks share: pixels as numbers, and normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.models.batch_norm import BatchNorm
from genscale.models.initial_weights import InitialWeights
from genscale.models.norms import Norm
from genscale.models.spectral_norm import spectral_norm

__all__ = ["GROUPS", "GROUP_CHANNELS", "SLOPE", "BatchNorm", "InitialWeights", "norm_layer", "spectral_norm", "to_signed",
           "to_unit"]  # with what stood here before, for packages that take it from here

SLOPE = 0.2
"""Slope of LeakyReLU below zero."""
GROUPS, GROUP_CHANNELS = 32, 16
"""Groups of a GroupNorm at most, and channels of a group at least (both of Wu and He 2018). In bf16 and channels-last PyTorch's
CPU kernels take 15 to 40 times as long for groups of 8."""


def to_signed(images: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """uint8 images as fp32 in [-1, 1], laid out so; what is floating-point already stays as it is."""
    return images if images.is_floating_point() else images.to(torch.float32, memory_format=memory_format) / 127.5 - 1


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [0, 1]; what is floating-point already stays as it is."""
    return images if images.is_floating_point() else images.float() / 255


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Normalisation over `(batch, channels, ...)`."""
    if kind == "batch":
        return BatchNorm(channels)
    if kind == "group":
        most = min(GROUPS, max(channels // GROUP_CHANNELS, 1))
        return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)
    return nn.Identity()
