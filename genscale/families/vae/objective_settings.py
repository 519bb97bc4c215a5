"""What a VAE and a VAE-GAN minimise: their `objective` sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class VAEObjectiveSettings:
    """The `objective` section of a VAE: reconstruction + beta x divergence, unless changed below."""

    beta: NonNegativeFloat = 1.0
    """Weight of the divergence of the posterior from the prior (Higgins et al. 2017, beta-VAE); 1: the evidence lower bound."""
    kl_warmup_steps: NonNegativeInt = 0
    """Steps over which that weight grows from 0 to beta (Bowman et al. 2016)."""
    free_bits: NonNegativeFloat = 0.0
    """Nats of each latent dimension that cost nothing beyond a constant (Kingma et al. 2016); of each image by itself, where
    the paper takes a batch's mean, so that no image's loss depends on others."""
    capacity: NonNegativeFloat | None = None
    """In the place of beta: capacity_weight x |divergence - C|, C growing from 0 to this many nats (Burgess et al. 2018)."""
    capacity_steps: PositiveInt = 10_000
    """capacity: steps over which C grows."""
    capacity_weight: PositiveFloat = 1000.0
    """capacity: weight of the distance from C."""
    importance_samples: PositiveInt = 1
    """Latents drawn for an image; more than one give the importance-weighted bound (Burda et al. 2016, IWAE)."""
    binarise: Literal["none", "fixed", "dynamic"] = "none"
    """bernoulli: draw black and white images from grey ones, once for ever (fixed) or anew each time (dynamic)."""


@dataclass(frozen=True)
class VAEGANObjectiveSettings:
    """The `objective` section of a VAE-GAN."""

    beta: NonNegativeFloat = 1.0
    """Encoder: weight of the divergence of the posterior from the prior beside the reconstruction."""
    reconstruction_weight: NonNegativeFloat = 0.01
    """Decoder: weight of the reconstruction beside the discriminator's judgement (the paper's gamma)."""
