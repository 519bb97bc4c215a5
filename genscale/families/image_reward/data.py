"""The data of a policy whose every answer is drawn: numbers of samples, in lanes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from genscale.data.lanes import Cursor, Data, Sample
from genscale.families.image_reward.settings import DrawnDataSettings


class DrawnData(Data):
    """Samples `{"number": int64}`: sample g has the number g."""

    def __init__(self, settings: DrawnDataSettings) -> None:
        self.lane_count, self._validation = settings.lanes, settings.validation_groups

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        position = cursor["position"] if cursor else 0
        while True:
            sample = {"number": np.array(position * self.lane_count + lane)}
            position += 1
            yield sample, {"position": position}

    def cursor_at(self, position: int) -> Cursor:
        return {"position": position}

    def validation(self) -> list[Sample]:
        return [{"number": np.array(number)} for number in range(self._validation)]

    def check(self, global_batch_size: int) -> None:
        """There are always enough."""

    def plan(self) -> dict[str, Any]:
        return {"drawn": "numbers", "lanes": self.lane_count}

    def close(self) -> None:
        """Nothing is open."""
