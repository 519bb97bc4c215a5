"""How samples are loaded: what the `data` section of every family has."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeInt, PositiveInt


@dataclass
class LoaderSettings:
    """How samples are loaded; a family's own `data` settings add to these."""

    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""
