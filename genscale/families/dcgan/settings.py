"""What the networks of a GAN are: the `model` section of the family `dcgan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import PositiveInt

from genscale.errors import UserError, refuse_unheeded
from genscale.models.norms import Norm

SIZES = (8, 16, 32, 64, 128, 256, 512)
SMALLEST_MAP = 4
"""Pixels of the side of the map that a generator begins with and a discriminator ends with."""


@dataclass(frozen=True)
class GANSettings:
    """A GAN of images: a generator and a discriminator, also conditional, Wasserstein, residual or fully connected."""

    family: Literal["dcgan"] = "dcgan"
    """What is trained."""
    architecture: Literal["dcgan", "residual", "mlp"] = "dcgan"
    """dcgan (Radford et al. 2015); residual, for large pictures (Miyato et al. 2018); mlp, for small ones (Goodfellow et al.
    2014)."""
    latent: PositiveInt = 100
    """Width of the latent vector."""
    width: PositiveInt = 64
    """Channels at the largest resolution; they double with each halving of the resolution. mlp: of each hidden layer."""
    discriminator_width: PositiveInt | None = None
    """The same of the discriminator (default: width)."""
    max_multiplier: PositiveInt = 8
    """Channels at the small resolutions are at most this many times the width."""
    hidden_layers: PositiveInt = 2
    """mlp: hidden layers of each network."""
    upsampling: Literal["transposed", "resize"] = "transposed"
    """dcgan's generator: transposed convolutions, or enlarging and convolution, which leaves no checkerboard (Odena et al.
    2016)."""
    generator_norm: Norm = "batch"
    """Normalisation in the generator; batch is over the batch of all processes."""
    discriminator_norm: Norm = "batch"
    """Normalisation in the discriminator; residual and mlp do best with none."""
    spectral_norm: bool = False
    """Spectral norm in the discriminator."""
    classes: PositiveInt | None = None
    """Condition both networks on this many classes (default: unconditional); needs data.labels."""
    conditioning: Literal["projection", "embedding"] = "projection"
    """How the discriminator sees the class: by projection (Miyato and Koyama 2018), or embedded as one more channel (Mirza and
    Osindero 2014)."""


def multipliers(size: int, most: int) -> list[int]:
    """Channels by width at the resolutions size/2, size/4, ... down to 4: 1, 2, 4, ... at most `most`."""
    return [min(2**level, most) for level in range((size // SMALLEST_MAP).bit_length() - 1)]


def check_gan(settings: GANSettings, shape: tuple[int, ...]) -> None:
    """Raises UserError where networks of these settings cannot make images of `shape`, `(channels, size, size)`, or would not
    heed one of them."""
    if settings.architecture != "mlp" and shape[-1] not in SIZES:
        nearest = min(SIZES, key=lambda size: abs(size - shape[-1]))
        raise UserError(f"data.size: {shape[-1]} is no power of two from {SIZES[0]} to {SIZES[-1]}, as model.architecture "
                        f"{settings.architecture} needs; the nearest is {nearest}")
    if settings.architecture == "mlp" and settings.classes and settings.conditioning == "embedding":
        raise UserError("model.conditioning: embedding adds a channel to an image, which model.architecture mlp does not see; "
                        "use projection")
    unheeded = {"dcgan": ["hidden_layers"], "residual": ["hidden_layers", "upsampling"],
                "mlp": ["max_multiplier", "upsampling"]}[settings.architecture]
    refuse_unheeded("model", settings, unheeded, f"model.architecture {settings.architecture}")
    if not settings.classes:
        refuse_unheeded("model", settings, ["conditioning"], "no model.classes")
