"""Generator and discriminator as multilayer perceptrons (Goodfellow et al. 2014, "Generative adversarial nets"), for small
images and for points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genscale.models.image_layers import SLOPE, norm_layer
from genscale.models.initial_draw import scale_initial
from genscale.models.spectral_norm import spectral_norm

RECTIFIED_GAIN = math.sqrt(2)
"""Gain of all layers: ReLU halves the variance of what it is given (He et al. 2015)."""


def spread_kinks(layers: Iterable[nn.Module], reach: float) -> None:
    """Give biases an initial deviation, so that the kinks of the first layer lie all over inputs of deviation `reach`.

    Without biases every kink passes through the origin, and inputs of few dimensions are told apart by their direction alone.
    """
    for index, layer in enumerate(layers):
        assert isinstance(layer, nn.Linear)
        scale_initial(layer, bias=RECTIFIED_GAIN * layer.in_features**-0.5 * (reach if index == 0 else 1.0))


class MLPGenerator(nn.Module):
    """Latents `(batch, latent)` to `(batch, *shape)`: images in [-1, 1], or points, which have no bounds.

    Args:
        settings: of family dcgan or points: latent, width, hidden_layers, generator_norm, classes.
        signs: of so many of a latent's entries, the first ones, the sign alone counts.
    """

    def __init__(self, settings: Any, shape: tuple[int, ...], bounded: bool = True, signs: int = 0) -> None:
        super().__init__()
        self.shape, self.bounded, self.signs = shape, bounded, signs
        self.embedding = nn.Embedding(settings.classes, settings.latent) if settings.classes else None
        inputs = settings.latent * (2 if settings.classes else 1)
        widths = [inputs, *[settings.width] * settings.hidden_layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(norm_layer(settings.generator_norm, width) for width in widths[1:])
        self.output = nn.Linear(widths[-1], math.prod(shape))
        for linear in (*self.hidden, self.output):
            scale_initial(linear, gain=RECTIFIED_GAIN)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.signs:
            latents = torch.cat([latents[:, : self.signs].sign(), latents[:, self.signs :]], 1)
        x = latents if self.embedding is None else torch.cat([latents, self.embedding(labels)], 1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = torch.relu(norm(linear(x)))
        x = self.output(x).unflatten(1, self.shape)
        return torch.tanh(x) if self.bounded else x


class MLPDiscriminator(nn.Module):
    """Images or points `(batch, *shape)` to logits `(batch,)`: above 0 where it takes them for real."""

    def __init__(self, settings: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        wrap = spectral_norm if settings.spectral_norm else (lambda layer: layer)
        width = settings.discriminator_width or settings.width
        widths = [math.prod(shape), *[width] * settings.hidden_layers]
        self.hidden = nn.ModuleList(wrap(nn.Linear(a, b)) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.Identity() if index == 0 else norm_layer(settings.discriminator_norm, width)
                                   for index in range(len(self.hidden)))
        self.output = wrap(nn.Linear(width, 1))
        for linear in (*self.hidden, self.output):
            scale_initial(linear, gain=RECTIFIED_GAIN)
        self.embedding = wrap(nn.Embedding(settings.classes, width)) if settings.classes else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = images.flatten(1)
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = nn.functional.leaky_relu(norm(linear(x)), SLOPE)
        logits = self.output(x).squeeze(1)
        return logits if self.embedding is None else logits + (self.embedding(labels) * x).sum(1)
