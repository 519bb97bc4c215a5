"""What the points of a GAN in the plane are drawn from: the `data` section of family `points`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt


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
