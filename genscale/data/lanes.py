"""The seam between data and everything else: lanes of samples, and the cursor that says how far a lane was read.

Global sample g lives in lane g % lane_count at position g // lane_count (docs/design.md, section 7). A lane is the same endless
sequence whoever reads it: processes and workers only decide who reads which lane.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

Sample = dict[str, np.ndarray]
Cursor = dict[str, Any]


class Data(ABC):
    """A training stream in lanes, and a fixed validation set. Must be picklable or forkable: workers read lanes too."""

    lane_count: int

    @abstractmethod
    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """Endless samples of one lane, each with the (small, JSON) cursor that continues right after it; from the
        start, or from a cursor."""

    def cursor_at(self, position: int) -> Cursor | None:
        """The cursor of a lane after its first `position` samples, where that can be told without reading them."""
        return None

    def samples_of_epoch(self) -> int | None:
        """How many samples an epoch has, where that is known without reading it."""
        return None

    @abstractmethod
    def validation(self) -> list[Sample]:
        """The fixed validation set, in a fixed order."""

    @abstractmethod
    def check(self, global_batch_size: int) -> None:
        """Raise UserError where the training data holds less than one global batch. Must not read an enormous source
        in full."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the order depends on (sources and sizes, seed, lanes, window, block, tokenizer hash): equal plans
        mean equal samples.
        A resume under another plan is refused, naming what changed."""

    @abstractmethod
    def close(self) -> None:
        """Release files and threads."""
