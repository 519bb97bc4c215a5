"""What the networks of a GAN on points are, and what the points are drawn from: the sections `model` and `data` of the family
`points`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from genscale.models.norms import Norm


@dataclass(frozen=True)
class PointsGANSettings:
    """A GAN in the plane, whose networks are multilayer perceptrons (Goodfellow et al. 2014)."""

    family: Literal["points"] = "points"
    """What is trained."""
    latent: PositiveInt = 2
    """Width of the latent vector."""
    latent_signs: NonNegativeInt = 0
    """How many of the latent's entries the generator takes the sign of: -1 or 1, and nothing between. What is drawn from a
    connected space and mapped continuously has points between the modes; discrete entries (as in Brock et al. 2019,
    appendix E) leave none there."""
    width: PositiveInt = 128
    """Width of each hidden layer."""
    discriminator_width: PositiveInt | None = None
    """The same of the discriminator (default: width)."""
    hidden_layers: PositiveInt = 3
    """Hidden layers of each network."""
    generator_norm: Norm = "none"
    """Normalisation in the generator; batch is over the batch of all processes."""
    discriminator_norm: Norm = "none"
    """Normalisation in the discriminator."""
    spectral_norm: bool = False
    """Spectral norm in the discriminator."""

    classes = None  # no setting: points have none


@dataclass(frozen=True)
class PointsDataSettings:
    """Points to train on; they are drawn as they are needed."""

    source: Literal["ring", "grid"] = "ring"
    """ring: 8 Gaussians on the unit circle; grid: 25 Gaussians, 2 apart."""
    pack: PositiveInt = 1
    """Points that the discriminator sees together (Lin et al. 2018, PacGAN); a sample, and so the batch size, then counts
    packs."""
    validation_points: PositiveInt = 2500
    """Points that an evaluation generates."""
    lanes: PositiveInt = 48
    """Parallel streams that make up the sample order."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""
