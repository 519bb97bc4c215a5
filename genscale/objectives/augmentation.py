"""Differentiable augmentation of what the discriminator sees (Zhao et al. 2020, "Differentiable augmentation for data-efficient
GAN training"). Every draw is addressed by sample."""

from __future__ import annotations

from collections.abc import Sequence

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
    height, width = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device) - (_places(u[:, i], 2 * most + 1) - most)
                     for i, n, most in ((0, height, int(height * SHIFT + 0.5)), (1, width, int(width * SHIFT + 0.5))))
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    batch = torch.arange(len(x), device=x.device).reshape(-1, 1, 1)
    moved = x.permute(0, 2, 3, 1)[batch, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)]
    return (moved * inside.unsqueeze(3)).permute(0, 3, 1, 2)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """A square of half the side is set to grey."""
    covered = []
    for i, n in enumerate(x.shape[2:]):
        cut = int(n * CUT + 0.5)
        start = _places(u[:, i], n + 1 - cut % 2) - cut // 2
        places = torch.arange(n, device=x.device)
        covered.append((places >= start) & (places < start + cut))
    return x * ~(covered[0].unsqueeze(2) & covered[1].unsqueeze(1)).unsqueeze(1)
