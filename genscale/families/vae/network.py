"""The variational autoencoder's networks (Kingma and Welling 2014): convolutional residual, or fully connected."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.families.vae.settings import VAESettings, resolved, sizes_of, widths_of
from genscale.models.image_layers import norm_layer
from genscale.models.initial_draw import scale_initial
from genscale.models.memory_format import set_memory_format
from genscale.models.norms import Norm
from genscale.objectives.likelihoods import LIKELIHOODS

__all__ = ["VAE", "Decoder", "DecoderLayers", "Encoder", "VAESettings", "latent_shape"]

HEAD_GAIN = 0.1
"""Gain of the layers that the encoder and the decoder put out with: a posterior near the prior, and grey images."""
INITIAL_LOG_SCALE = -1.5
"""About that of an image's pixels: one trained number would be long on its way from 0."""
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -20.0, 10.0


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside the identity (He et al. 2016): `(batch, inputs, h, w)` to `(batch, outputs, h,
    w)`; then attention, and then half or double the size, where asked for."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, attention: bool = False, resample: str | None = None) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm_layer(norm, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm_layer(norm, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        scale_initial(self.conv2, gain=0.0)  # a block is the identity at first, so that any depth trains
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention = SpatialAttention(outputs, norm) if attention else None
        self.resample = resample
        if resample is not None:
            self.resampling = nn.Conv2d(outputs, outputs, 3, stride=2 if resample == "down" else 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        x = self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))
        if self.attention is not None:
            x = self.attention(x)
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.resampling(x) if self.resample is not None else x


class SpatialAttention(nn.Module):
    """Every place of a feature map attends to every other, beside the identity: `(batch, channels, h, w)` to the same."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm_layer(norm, channels)
        self.input, self.output = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        scale_initial(self.output, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        places = self.input(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (batch, 1 head, places, 3 x channels)
        attended = F.scaled_dot_product_attention(*places.chunk(3, dim=-1))
        return x + self.output(attended[:, 0].transpose(1, 2).reshape(x.shape))


class _HiddenLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def _hidden(inputs: int, settings: VAESettings) -> nn.ModuleList:
    widths = [inputs, *[settings.hidden_width] * settings.hidden_layers]
    return nn.ModuleList(_HiddenLayer(*pair) for pair in pairwise(widths))


def _start(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The input in the precision that the layer's weights have now (ZeRO and FSDP2 may hold them in bf16)."""
    x = x.to(layer.weight.dtype)
    # Not `contiguous`, to which one channel is channels-last anyway.
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


class Encoder(nn.Module):
    """Pixels to a Gaussian over latents."""

    def __init__(self, settings: VAESettings, size: int, channels: int) -> None:
        super().__init__()
        self.settings = settings = resolved(settings, size)
        if settings.architecture == "mlp":
            self.layers = _hidden(channels * size * size, settings)
            self.head: nn.Module = nn.Linear(settings.hidden_width, 2 * settings.latents)
        else:
            widths, sizes = widths_of(settings), sizes_of(settings, size)
            self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
            self.layers = nn.ModuleList(_encoder_blocks(settings, widths, sizes))
            self.final_norm = norm_layer(settings.norm, widths[-1])
            self.head = nn.Conv2d(widths[-1], 2 * settings.latents, 3, padding=1) if settings.latent == "spatial" \
                else nn.Linear(widths[-1] * sizes[-1] ** 2, 2 * settings.latents)
        scale_initial(self.head, gain=HEAD_GAIN)
        set_memory_format(self, torch.channels_last)  # as the images are: a convolution copies a weight that lies otherwise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each `(batch, *latent_shape)` in fp32, of pixels `(batch, channels, size,
        size)`."""
        if self.settings.architecture == "mlp":
            x = _start(images.flatten(1), cast(_HiddenLayer, self.layers[0]).linear)
        else:
            x = self.stem(_start(images, self.stem))
        for layer in self.layers:
            x = layer(x)
        if self.settings.architecture == "convolutional":
            x = F.silu(self.final_norm(x))
            x = x if self.settings.latent == "spatial" else x.flatten(1)
        mean, log_variance = self.head(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are sharded, compiled and recomputed one at a time."""
        return list(self.layers)


def _encoder_blocks(settings: VAESettings, widths: list[int], sizes: list[int]) -> list[ResidualBlock]:
    blocks, inputs = [], widths[0]
    for level, (outputs, size) in enumerate(zip(widths, sizes, strict=True)):
        for index in range(settings.blocks):
            down = index == settings.blocks - 1 and level < len(widths) - 1
            blocks.append(ResidualBlock(inputs, outputs, settings.norm, size in settings.attention, "down" if down else None))
            inputs = outputs
    return blocks


def _decoder_blocks(settings: VAESettings, widths: list[int], sizes: list[int]) -> list[ResidualBlock]:
    blocks, inputs = [], widths[-1]
    for level in reversed(range(len(widths))):
        for index in range(settings.blocks):
            up = index == settings.blocks - 1 and level > 0
            blocks.append(ResidualBlock(inputs, widths[level], settings.norm, sizes[level] in settings.attention,
                                        "up" if up else None))
            inputs = widths[level]
    return blocks


class DecoderLayers(nn.Module):
    """A decoder's layers."""

    def __init__(self, settings: VAESettings, size: int, channels: int) -> None:
        super().__init__()
        self.settings = settings = resolved(settings, size)
        self.shape = (channels, size, size)
        self.scale = None if settings.likelihood == "bernoulli" else settings.scale
        self.floor = LIKELIHOODS[settings.likelihood].floor
        self.outputs = channels * (2 if self.scale == "learned" else 1)
        if settings.architecture == "mlp":
            self.layers = _hidden(settings.latents, settings)
            self.head: nn.Module = nn.Linear(settings.hidden_width, self.outputs * size * size)
        else:
            widths, sizes = widths_of(settings), sizes_of(settings, size)
            self.start = (widths[-1], sizes[-1], sizes[-1])
            self.stem: nn.Conv2d | nn.Linear = nn.Linear(settings.latents, math.prod(self.start)) \
                if settings.latent != "spatial" else nn.Conv2d(settings.latents, widths[-1], 3, padding=1)
            self.layers = nn.ModuleList(_decoder_blocks(settings, widths, sizes))
            self.final_norm = norm_layer(settings.norm, widths[0])
            self.head = nn.Conv2d(widths[0], self.outputs, 3, padding=1)
        scale_initial(self.head, gain=HEAD_GAIN)
        self.shared_scale = _SharedScale(channels) if self.scale == "shared" else None
        set_memory_format(self, torch.channels_last)  # as the images are: a convolution copies a weight that lies otherwise

    def pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Location `(batch, channels, size, size)` and logarithm of the scale (of a shape that broadcasts against it; without
        meaning for bernoulli), in fp32, of latents `(batch, *latent_shape)`."""
        if self.settings.architecture == "mlp":
            x = _start(latents, cast(_HiddenLayer, self.layers[0]).linear)
        else:
            x = self.stem(_start(latents, self.stem)).reshape(-1, *self.start).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x)
        if self.settings.architecture == "convolutional":
            x = F.silu(self.final_norm(x))
        x = self.head(x).float().reshape(-1, self.outputs, *self.shape[1:])
        if self.scale == "learned":
            location, log_scale = x.chunk(2, dim=1)
            return location, self._above_floor(log_scale)
        if self.shared_scale is not None:
            return x, self._above_floor(self.shared_scale())
        return x, x.new_full((), 0.0 if self.scale is None else math.log(self.settings.scale_value))

    def _above_floor(self, output: Tensor) -> Tensor:
        return self.floor + F.softplus(INITIAL_LOG_SCALE + output - self.floor)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are sharded, compiled and recomputed one at a time."""
        return list(self.layers)


class Decoder(DecoderLayers):
    """Latents to what a likelihood needs to know of each pixel."""

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """As `pixels`."""
        return self.pixels(latents)


class _SharedScale(nn.Module):
    """One trained number a channel, `(channels, 1, 1)`. A module, so that whoever shards parameters knows when it is needed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self) -> Tensor:
        return self.bias.float()[:, None, None] * 1.0  # no view, which would lose its memory when the weight is sharded again


def latent_shape(settings: VAESettings, size: int) -> tuple[int, ...]:
    """The shape of one image's latent: `(latents,)`, or `(latents, height, width)` of a spatial one."""
    if settings.latent == "vector":
        return (settings.latents,)
    smallest = sizes_of(resolved(settings, size), size)[-1]
    return settings.latents, smallest, smallest


class VAE(nn.Module):
    """Encoder and decoder as one network, so that a wrapper sees all calls as calls of the network.

    Args:
        settings: the shape.
        size, channels: of the images.

    Raises:
        UserError: settings that no VAE of such images can have.
    """

    def __init__(self, settings: VAESettings, size: int, channels: int) -> None:
        super().__init__()
        self.encoder = Encoder(settings, size, channels)
        self.decoder = Decoder(settings, size, channels)

    def forward(self, images: Tensor | None = None, noise: Tensor | None = None,
                latents: Tensor | None = None) -> tuple[Tensor, ...]:
        """Encode and decode; or one of the two.

        Args:
            images: pixels `(batch, channels, size, size)` as the likelihood has them; alone: they are encoded.
            noise: `(batch, samples, *latent_shape)`, standard normal: latents are mean + deviation x noise.
            latents: `(batch, *latent_shape)`, alone: they are decoded.

        Returns:
            mean, log_variance `(batch, *latent_shape)`, latents `(batch, samples, *latent_shape)`, location, log_scale (of
            batch x samples images, in order); or the first two; or the last two. All fp32.
        """
        if latents is not None:
            return self.decoder(latents)
        mean, log_variance = self.encoder(images)
        if noise is None:
            return mean, log_variance
        # In fp32 under any precision: the losses are made of these very numbers.
        latents = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise.float()
        location, log_scale = self.decoder(latents.flatten(0, 1))
        return mean, log_variance, latents, location, log_scale

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are sharded, compiled and recomputed one at a time."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]
