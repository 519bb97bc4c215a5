"""Deep convolutional GAN (Radford et al. 2015, "Unsupervised representation learning with deep convolutional generative
adversarial networks") for square images of any power of two."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from genscale.families.dcgan.settings import SMALLEST_MAP, GANSettings, multipliers
from genscale.models.image_layers import SLOPE, norm_layer
from genscale.models.memory_format import set_memory_format
from genscale.models.spectral_norm import spectral_norm


class LatentInput(nn.Module):
    """Latent vector, and class where conditional, to the generator's first map `(batch, channels, 4, 4)`."""

    def __init__(self, settings: GANSettings, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.classes, settings.latent) if settings.classes else None
        inputs = settings.latent * (2 if settings.classes else 1)
        # A bias only where no norm follows to take it away again.
        self.linear = nn.Linear(inputs, channels * SMALLEST_MAP**2, bias=settings.generator_norm == "none")
        self.channels = channels

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        if self.embedding is not None:
            latents = torch.cat([latents, self.embedding(labels)], 1)
        x = self.linear(latents).unflatten(1, (self.channels, SMALLEST_MAP, SMALLEST_MAP))
        return x.contiguous(memory_format=torch.channels_last)


class ImageHead(nn.Module):
    """The discriminator's last map `(batch, channels, 4, 4)` to logits `(batch,)`."""

    def __init__(self, settings: GANSettings, channels: int) -> None:
        super().__init__()
        wrap = spectral_norm if settings.spectral_norm else (lambda layer: layer)
        self.linear = wrap(nn.Linear(channels * SMALLEST_MAP**2, 1, bias=settings.spectral_norm))
        self.embedding = wrap(nn.Embedding(settings.classes, channels)) \
            if settings.classes and settings.conditioning == "projection" else None

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        logits = self.linear(x.flatten(1)).squeeze(1)
        if self.embedding is not None:
            # The sum over positions, as in Miyato and Koyama 2018.
            logits = logits + (self.embedding(labels) * x.sum((2, 3))).sum(1)
        return logits


class LabelChannel(nn.Module):
    """The class as one more channel of the image (Mirza and Osindero 2014)."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, size * size)
        self.size = size

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        plane = self.embedding(labels).unflatten(1, (1, self.size, self.size)).to(x.dtype)
        return torch.cat([x, plane], 1)


class UpStage(nn.Module):
    """Doubles the resolution: convolution, normalisation, ReLU."""

    def __init__(self, settings: GANSettings, inputs: int, outputs: int) -> None:
        super().__init__()
        bias = settings.generator_norm == "none"
        if settings.upsampling == "transposed":
            self.conv: nn.ConvTranspose2d | nn.Conv2d = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=bias)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=bias)
        self.enlarge = settings.upsampling == "resize"
        self.norm = norm_layer(settings.generator_norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.enlarge:
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        x = self.norm(self.conv(x))
        # In place what the normalisation made; a convolution's own result is kept by selective checkpointing.
        return torch.relu(x) if isinstance(self.norm, nn.Identity) else torch.relu_(x)


class DownStage(nn.Module):
    """Halves the resolution: strided convolution, normalisation, LeakyReLU."""

    def __init__(self, settings: GANSettings, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        # The paper: no normalisation at the input; a bias only where nothing else shifts.
        self.norm = nn.Identity() if first else norm_layer(settings.discriminator_norm, outputs)
        self.conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=isinstance(self.norm, nn.Identity) and not first)
        if settings.spectral_norm:
            spectral_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.conv(x)), SLOPE, inplace=not isinstance(self.norm, nn.Identity))


class DCGANGenerator(nn.Module):
    """Latents `(batch, latent)` to images `(batch, channels, size, size)` in [-1, 1]."""

    def __init__(self, settings: GANSettings, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, size = shape[0], shape[-1]
        widths = [settings.width * m for m in reversed(multipliers(size, settings.max_multiplier))]
        self.input = LatentInput(settings, widths[0])
        self.input_norm = norm_layer(settings.generator_norm, widths[0])
        self.stages = nn.ModuleList(UpStage(settings, a, b) for a, b in itertools.pairwise(widths))
        last = UpStage(settings, widths[-1], channels)
        self.output, self.enlarge = last.conv, last.enlarge
        set_memory_format(self, torch.channels_last)  # as the images are: a convolution copies a weight that lies otherwise

    def blocks(self) -> list[nn.Module]:
        """The stages, which are sharded, compiled and recomputed one at a time."""
        return list(self.stages)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        x = torch.relu_(self.input_norm(self.input(latents, labels)))
        for stage in self.stages:
            x = stage(x)
        if self.enlarge:
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return torch.tanh(self.output(x))


class DiscriminatorStages(nn.Module):
    """A discriminator's layers: stages that each halve the resolution, and the head.

    Attributes:
        stage: makes what halves the resolution, of (settings, channels in, channels out, first).
    """

    stage: type[nn.Module]

    def __init__(self, settings: GANSettings, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, size = shape[0], shape[-1]
        width = settings.discriminator_width or settings.width
        widths = [width * m for m in multipliers(size, settings.max_multiplier)]
        self.label_channel = LabelChannel(settings.classes, size) \
            if settings.classes and settings.conditioning == "embedding" else None
        inputs = [channels + (self.label_channel is not None), *widths]
        self.stages = nn.ModuleList(self.stage(settings, a, b, first=index == 0)
                                    for index, (a, b) in enumerate(zip(inputs, widths, strict=False)))
        self.head = ImageHead(settings, widths[-1])
        set_memory_format(self, torch.channels_last)  # as the images are: a convolution copies a weight that lies otherwise

    def blocks(self) -> list[nn.Module]:
        """The stages, which are sharded, compiled and recomputed one at a time."""
        return list(self.stages)


class StagedDiscriminator(DiscriminatorStages):
    """Images `(batch, channels, size, size)` to logits `(batch,)`: above 0 where it takes them for real."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        x = images if self.label_channel is None else self.label_channel(images, labels)
        x = x.to(memory_format=torch.channels_last)  # not `contiguous`, to which one channel is channels-last anyway
        for stage in self.stages:
            x = stage(x)
        return self.head(self.activate(x), labels)

    def activate(self, x: Tensor) -> Tensor:
        """What the last map goes through before the head."""
        return x


class DCGANDiscriminator(StagedDiscriminator):
    """The paper's: strided convolutions."""

    stage = DownStage
