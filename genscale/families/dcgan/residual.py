"""Residual generator and discriminator as in Miyato et al. 2018 ("Spectral normalization for generative adversarial networks"),
for large images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.families.dcgan.networks import LatentInput, StagedDiscriminator
from genscale.families.dcgan.settings import GANSettings, multipliers
from genscale.models.image_layers import norm_layer
from genscale.models.memory_format import set_memory_format
from genscale.models.spectral_norm import spectral_norm


class UpBlock(nn.Module):
    """Doubles the resolution: normalisation, ReLU, enlarging and convolution, twice, beside an enlarged shortcut."""

    def __init__(self, settings: GANSettings, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(settings.generator_norm, inputs), norm_layer(settings.generator_norm, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.interpolate(torch.relu(self.norm1(x)), scale_factor=2, mode="nearest"))
        y = self.conv2(torch.relu(self.norm2(y)))
        # A 1x1 convolution and enlarging change places without changing the result, and this order is cheaper.
        return y + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class DownBlock(nn.Module):
    """Halves the resolution by averaging: ReLU and convolution, twice, beside an averaged shortcut. The block at the input
    begins without ReLU, which would lose half of the image."""

    def __init__(self, settings: GANSettings, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        wrap = spectral_norm if settings.spectral_norm else (lambda layer: layer)
        self.norm1 = nn.Identity() if first else norm_layer(settings.discriminator_norm, inputs)
        self.norm2 = norm_layer(settings.discriminator_norm, outputs)
        self.conv1, self.conv2 = wrap(nn.Conv2d(inputs, outputs, 3, 1, 1)), wrap(nn.Conv2d(outputs, outputs, 3, 1, 1))
        self.shortcut = wrap(nn.Conv2d(inputs, outputs, 1, bias=False))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResidualGenerator(nn.Module):
    """Latents `(batch, latent)` to images `(batch, channels, size, size)` in [-1, 1]."""

    def __init__(self, settings: GANSettings, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, size = shape[0], shape[-1]
        widths = [settings.width * m for m in reversed(multipliers(size, settings.max_multiplier))]
        self.input = LatentInput(settings, widths[0])
        self.stages = nn.ModuleList(UpBlock(settings, a, b) for a, b in zip(widths[:1] + widths, widths, strict=False))
        self.output_norm = norm_layer(settings.generator_norm, widths[-1])
        self.output = nn.Conv2d(widths[-1], channels, 3, 1, 1)
        set_memory_format(self, torch.channels_last)  # as the images are: a convolution copies a weight that lies otherwise

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, which are sharded, compiled and recomputed one at a time."""
        return list(self.stages)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.input(latents, labels)
        for stage in self.stages:
            x = stage(x)
        return torch.tanh(self.output(torch.relu(self.output_norm(x))))


class ResidualDiscriminator(StagedDiscriminator):
    """Residual blocks, and a ReLU before the head."""

    stage = DownBlock

    def activate(self, x: Tensor) -> Tensor:
        return torch.relu(x)
