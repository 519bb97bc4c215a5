"""What a VAE is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from genscale.errors import UserError, refuse_unheeded

SMALLEST = 4
"""Pixels to which the encoder goes down where nothing else is asked for."""
DEFAULT_MULTIPLIERS = (1, 2, 4)


@dataclass(frozen=True)
class VAESettings:
    """A variational autoencoder of images, also importance-weighted."""

    family: Literal["vae"] = "vae"
    """Kind of model."""
    architecture: Literal["convolutional", "mlp"] = "convolutional"
    """convolutional: residual, of any depth; mlp: the fully connected network of the first papers, with tanh."""
    width: PositiveInt = 64
    """convolutional: channels at the full size of the images."""
    multipliers: list[PositiveInt] | None = None
    """convolutional: channels at each size, as multiples of width, from the full size on, each half of the one before (default:
    [1, 2, 4, 4, ...] down to 4 pixels, or to what an odd size allows)."""
    blocks: PositiveInt = 1
    """convolutional: residual blocks at each size, in the encoder and in the decoder."""
    attention: list[PositiveInt] = field(default_factory=list)
    """convolutional: sizes, in pixels, at which self-attention follows each block, such as [8]."""
    norm: Literal["group", "none"] = "group"
    """convolutional: normalisation in the blocks: GroupNorm, or none."""
    hidden_layers: PositiveInt = 2
    """mlp: hidden layers of the encoder, and of the decoder."""
    hidden_width: PositiveInt = 200
    """mlp: units in a hidden layer."""
    latent: Literal["vector", "spatial"] = "vector"
    """vector: one latent vector an image; spatial: one at each place of the smallest size."""
    latents: PositiveInt = 64
    """Length of a latent vector (at each place, of a spatial latent)."""
    likelihood: Literal["bernoulli", "gaussian", "logistic"] = "logistic"
    """Distribution of pixels given the latent: bernoulli (black and white, or intensities as probabilities), gaussian (a
    density), or logistic (a probability of each of the 256 values)."""
    scale: Literal["fixed", "shared", "learned"] = "shared"
    """gaussian: standard deviation, logistic: scale, for pixels in [-1, 1]. fixed: scale_value; shared: one a channel, trained;
    learned: the decoder gives one for every pixel."""
    scale_value: PositiveFloat = 0.1
    """scale fixed: its value."""


def widths_of(settings: VAESettings) -> list[int]:
    """Channels of the feature maps of these resolved settings, of an architecture that has some, the largest map first."""
    assert settings.multipliers is not None
    return [settings.width * multiplier for multiplier in settings.multipliers]


def sizes_of(settings: VAESettings, size: int) -> list[int]:
    """Sizes of the same maps in pixels, from the images' own down to the smallest."""
    return [size >> level for level in range(len(widths_of(settings)))]


def resolved(settings: VAESettings, size: int) -> VAESettings:
    """The settings with nothing left open, for images of `size` pixels.

    Raises:
        UserError: settings that no VAE of such images can have.
    """
    unheeded = {"mlp": ["width", "multipliers", "blocks", "attention", "norm"],
                "convolutional": ["hidden_layers", "hidden_width"]}[settings.architecture]
    refuse_unheeded("model", settings, unheeded, f"model.architecture {settings.architecture}")
    if settings.likelihood == "bernoulli":
        refuse_unheeded("model", settings, ["scale", "scale_value"], "model.likelihood bernoulli")
    if settings.scale != "fixed":
        refuse_unheeded("model", settings, ["scale_value"], f"model.scale {settings.scale}")
    if settings.architecture == "mlp":
        if settings.latent == "spatial":
            raise UserError("model.latent: spatial needs feature maps, and model.architecture mlp has none; set model.latent "
                            "vector, or model.architecture convolutional")
        return settings
    multipliers = settings.multipliers or _default_multipliers(size)
    settings = replace(settings, multipliers=multipliers)
    deepest = _halvings(size) + 1
    if len(multipliers) > deepest:
        raise UserError(f"model.multipliers: {multipliers} halves {len(multipliers) - 1} times, and "
                        f"data.size {size} can be halved {deepest - 1} times; give at most {deepest} multipliers")
    sizes = sizes_of(settings, size)
    for wanted in settings.attention:
        if wanted not in sizes:
            nearest = min(sizes, key=lambda each: abs(each - wanted))
            raise UserError(f"model.attention: there is no feature map of {wanted} pixels; those of this model have "
                            f"{', '.join(map(str, sizes))}; nearest allowed: {nearest}")
    return settings


def _halvings(size: int) -> int:
    """How often the size divides by two."""
    return (size & -size).bit_length() - 1


def _default_multipliers(size: int) -> list[int]:
    multipliers, smallest = [DEFAULT_MULTIPLIERS[0]], size
    while smallest > SMALLEST and smallest % 2 == 0:
        smallest //= 2
        multipliers.append(DEFAULT_MULTIPLIERS[min(len(multipliers), len(DEFAULT_MULTIPLIERS) - 1)])
    return multipliers


@dataclass(frozen=True)
class VAEGANSettings:
    """A VAE of images whose decoder is a GAN's generator too. No layer of it couples the samples of a batch."""

    family: Literal["vae_gan"] = "vae_gan"
    """Kind of model."""
    width: PositiveInt = 64
    """Encoder and decoder: channels at the full size of the images."""
    multipliers: list[PositiveInt] | None = None
    """Encoder and decoder: channels at each size, as multiples of width, from the full size on, each half of the one before
    (default: [1, 2, 4, 4, ...] down to 4 pixels)."""
    blocks: PositiveInt = 1
    """Encoder and decoder: residual blocks at each size."""
    attention: list[PositiveInt] = field(default_factory=list)
    """Encoder and decoder: sizes, in pixels, at which self-attention follows each block, such as [8]."""
    norm: Literal["group", "none"] = "group"
    """Encoder and decoder: normalisation."""
    latents: PositiveInt = 64
    """Length of the latent vector."""
    discriminator_width: PositiveInt | None = None
    """Discriminator: channels at half the size of the images, doubling with each further halving (default: width)."""
    discriminator_norm: Literal["group", "none"] = "group"
    """Discriminator: normalisation."""
    spectral_norm: bool = False
    """Discriminator: spectral norm of its layers (Miyato et al. 2018)."""
    feature_stage: PositiveInt | None = None
    """Discriminator: the stage (1 is the first, and halves the size) whose output reconstructions are compared in (default: the
    one before the last)."""
