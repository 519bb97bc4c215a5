"""Differentiable augmentation of what the discriminator sees (Zhao et al. 2020, "Differentiable augmentation for data-efficient
GAN training"). Every draw is addressed by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.objectives.gan_settings import Augmentation
from genscale.rng import Draws

SHIFT = 0.125
"""Share of the side that an image is moved by, at most."""
CUT = 0.5
"""Share of the side that is cut out."""


def augment(images: Tensor, kinds: Sequence[Augmentation], draws: Draws, stream: str) -> Tensor:
    """Images `(batch x n, channels, height, width)` in [-1, 1], n of a sample after each other, each changed in its own way;
    gradients pass through."""
    of_a_sample = len(images) // len(draws.samples)
    for kind in kinds:
        u = draws.uniform(f"{stream} {kind}", of_a_sample, 3).flatten(0, 1).to(images)
        images = {"color": _color, "translation": _translation, "cutout": _cutout}[kind](images, u)
    return images


def _color(x: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = (column.reshape(-1, 1, 1, 1) for column in u.unbind(1))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    middle = x.mean((1, 2, 3), keepdim=True)
    return (x - middle) * (contrast + 0.5) + middle


def _places(u: Tensor, choices: int) -> Tensor:
    """Uniform whole numbers below `choices`, `(batch, 1)`."""
    return (u * choices).long().clamp(max=choices - 1).unsqueeze(1)


def _translation(x: Tensor, u: Tensor) -> Tensor:
    """Moved by whole pixels; grey (0, as in the authors' code) comes in from the side."""
    most = [int(n * SHIFT + 0.5) for n in x.shape[2:]]
    down, right = (_places(u[:, i], 2 * shift + 1).squeeze(1) - shift for i, shift in enumerate(most))
    return _Moved.apply(x.permute(0, 2, 3, 1), down, right, *most).permute(0, 3, 1, 2)


class _Moved(torch.autograd.Function):
    """Images `(batch, height, width, channels)`, each moved down and to the right by so many pixels, int64 `(batch,)`, at most
    `below` and `beside`. Each is cut out of a padded copy whole; the gradient is moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, right: Tensor, below: int, beside: int) -> Tensor:
        ctx.save_for_backward(down, right)
        ctx.most = below, beside
        batch, height, width, channels = x.shape
        padded = x.new_zeros(batch, height + 2 * below, width + 2 * beside, channels)
        padded[:, below : below + height, beside : beside + width] = x
        image, row, column, channel = padded.stride()
        places = padded.as_strided((batch, 2 * below + 1, 2 * beside + 1, height, width, channels),
                                   (image, row, column, row, column, channel))
        return places[torch.arange(batch, device=x.device), below - down, beside - right]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        down, right = ctx.saved_tensors
        return _Moved.apply(gradient, -down, -right, *ctx.most), None, None, None, None


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """A square of half the side is set to grey."""
    covered = []
    for i, n in enumerate(x.shape[2:]):
        cut = int(n * CUT + 0.5)
        start = _places(u[:, i], n + 1 - cut % 2) - cut // 2
        places = torch.arange(n, device=x.device)
        covered.append((places >= start) & (places < start + cut))
    return x * ~(covered[0].unsqueeze(2) & covered[1].unsqueeze(1)).unsqueeze(1)
