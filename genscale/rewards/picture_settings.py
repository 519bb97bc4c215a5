"""What can be set of rewards of pictures; in a file that does not name torch, for whose types reading a config would wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from genscale.errors import UserError


@dataclass(frozen=True)
class BrightnessSettings:
    """Which brightness is wished for."""

    target: float | None = None
    """Mean of all pixels that is best, from 0 to 1 (default: the brighter the better)."""

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target <= 1:
            raise UserError(f"target: must be from 0 to 1, not {self.target:g}")


@dataclass(frozen=True)
class ClassifiedSettings:
    """Which class is wished for, and whose."""

    run: str
    """Run folder of a VAE or GAN on images with labels: a small classifier of its images, which `genscale evaluate` uses too,
    is trained once in a minute and kept beside the run folder. A family may keep it with its own frozen networks."""
    label: str
    """The class that is wished for, by its name in the data."""
    what: Literal["is", "probability"] = "is"
    """is: 1 where the class is the most likely one, else 0; probability: that of the class."""
