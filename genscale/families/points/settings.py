"""What the networks of a GAN on points are: the `model` section of the family `points`."""

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
