"""Points from mixtures of Gaussians in the plane, where what a GAN has learned can be counted (Lin et al. 2018, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genscale.data.lanes import Cursor, Data, Sample
from genscale.families.points.settings import PointsDataSettings
from genscale.rng import Draws

DRAWN_TOGETHER = 64


@dataclass(frozen=True)
class Mixture:
    """Equal shares of Gaussians around `centers` `(modes, 2)` with deviation `std` in each direction."""

    centers: np.ndarray
    std: float


def _ring() -> Mixture:
    angles = 2 * np.pi * np.arange(8) / 8
    return Mixture(np.stack([np.cos(angles), np.sin(angles)], 1), 0.01)


def _grid() -> Mixture:
    side = np.arange(-4, 5, 2.0)
    return Mixture(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), 0.05)


MIXTURES = {"ring": _ring(), "grid": _grid()}
"""ring: 8 modes on the unit circle with variance 1e-4; grid: 25 modes, 2 apart, with variance 0.0025 (Srivastava et al. 2017,
VEEGAN; Lin et al. 2018)."""


class PointsData(Data):
    """Samples `{"point": float32 (2,)}`, point g a function of the seed and g."""

    def __init__(self, settings: PointsDataSettings, seed: int) -> None:
        self.settings, self.seed, self.lane_count = settings, seed, settings.lanes
        self.mixture = MIXTURES[settings.source]
        self._blocks: dict[int, np.ndarray] = {}

    def _points(self, scope: str, numbers: np.ndarray) -> np.ndarray:
        """Points by number, float32 `(numbers, 2)`."""
        draws = Draws(self.seed, scope, 0, torch.from_numpy(numbers))
        centers = self.mixture.centers[(draws.uniform("mode").numpy() * len(self.mixture.centers)).astype(np.int64)]
        return (centers + self.mixture.std * draws.normal("offset", 2).numpy()).astype(np.float32)

    def _block(self, number: int) -> np.ndarray:
        """So many points of every lane, `(DRAWN_TOGETHER, lanes, 2)`: a call costs more than its points."""
        if number not in self._blocks:
            size = DRAWN_TOGETHER * self.lane_count
            points = self._points("points", np.arange(number * size, (number + 1) * size))
            # Lanes are in step: two blocks are all that are read at a time.
            self._blocks = {**dict(list(self._blocks.items())[-1:]), number: points.reshape(DRAWN_TOGETHER, -1, 2)}
        return self._blocks[number]

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        position = cursor["position"] if cursor else 0
        while True:
            block, place = divmod(position, DRAWN_TOGETHER)
            for point in self._block(block)[place:, lane]:
                position += 1
                yield {"point": point}, {"position": position}

    def validation(self) -> list[Sample]:
        return [{"point": point} for point in self._points("validation", np.arange(self.settings.validation_points))]

    def check(self, global_batch_size: int) -> None:
        """There are always enough."""

    def plan(self) -> dict[str, Any]:
        return {"mixture": self.settings.source, "lanes": self.lane_count, "seed": self.seed}

    def close(self) -> None:
        """Nothing is open."""
