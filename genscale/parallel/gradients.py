"""What is done to gradients between backward and the optimizer: filled in, measured, clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from genscale.models.device_kind import on_gpu

NORM_ROW = 1024  # elements
SHORT = 32 * NORM_ROW
"""Gradients of as many elements are taken together: a call costs more than their copies in fp64."""


def fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters without a gradient one of zeros. A penalty has none for the last bias, and a parameter without one would
    be stepped (decayed, moved by its momentum) under one strategy and not under another."""
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in fp64; of long gradients in rows of `NORM_ROW` in fp32 first, which is off by
    some 1e-8 at most.

    In fp32 throughout the norm of a few million elements is off by some 1e-6, by another amount in every sharding, and clipping
    would pass that on to the weights; in fp64 throughout torch makes a copy in fp64 first, which takes several times as long.
    """
    if gradients and on_gpu(gradients[0]):  # whose kernels add up in a tree, to 1e-7, and are slow in fp64
        return torch.stack(torch._foreach_norm(list(gradients))).double().square().sum()
    short = [gradient for gradient in gradients if gradient.numel() <= SHORT]
    total = torch.stack(torch._foreach_norm(short, 2.0, torch.float64)).square().sum() if short \
        else torch.zeros((), dtype=torch.float64)
    for gradient in (gradient for gradient in gradients if gradient.numel() > SHORT):
        # A channels-last gradient in the order in which it lies: no copy.
        channels_last = gradient.ndim == 4 and gradient.is_contiguous(memory_format=torch.channels_last)
        flat = (gradient.permute(0, 2, 3, 1) if channels_last else gradient).reshape(-1)
        whole = flat.numel() // NORM_ROW * NORM_ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
        total += rows.double().square().sum() + torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square()
    return total


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """What brings gradients of this norm down to `clip`, as torch.nn.utils.clip_grad_norm_ does: a scalar on the device, 1 for
    those that are small enough. The norm is not read."""
    return (clip / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, clip: float) -> None:
    """Scale the gradients down, in place, to a global norm of `clip` (0 = never)."""
    if clip > 0 and gradients:
        torch._foreach_mul_(list(gradients), clip_factor(norm, clip).to(gradients[0]))
