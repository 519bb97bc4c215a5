"""Rewards of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from genscale.errors import UserError, nearest
from genscale.rewards.base import ImageReward
from genscale.rewards.runs import image_classifier

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BrightnessSettings:
    """Which brightness is wished for."""

    target: float | None = None
    """Mean of all pixels that is best, from 0 to 1 (default: the brighter the better)."""

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target <= 1:
            raise UserError(f"target: must be from 0 to 1, not {self.target:g}")


class Brightness(ImageReward):
    """The mean of all pixels, from 0 (black) to 1; or minus its distance from a target.

    >>> import torch
    >>> Brightness(BrightnessSettings()).judge(torch.full((2, 1, 4, 4), 0.25)).tolist()
    [0.25, 0.25]
    """

    settings = BrightnessSettings

    def judge(self, images: Tensor) -> Tensor:
        """From 0 to 1; with a target from -1 to 0."""
        mean = images.double().flatten(1).mean(1)
        return mean if self.asked.target is None else -(mean - self.asked.target).abs()


@dataclass(frozen=True)
class ClassifiedSettings:
    """Which class is wished for, and whose."""

    run: str
    """Run folder of a VAE or GAN on images with labels: a small classifier of its images, which `genscale evaluate` uses too,
    is trained once in a minute and kept beside the run folder."""
    label: str
    """The class that is wished for, by its name in the data."""
    what: Literal["is", "probability"] = "is"
    """is: 1 where the class is the most likely one, else 0; probability: that of the class."""


class Classified(ImageReward):
    """Whether a classifier takes the picture for one of the wished class."""

    settings = ClassifiedSettings

    def __init__(self, asked: ClassifiedSettings) -> None:
        super().__init__(asked)
        self._network: Any
        self._network, names = image_classifier(asked.run)
        if asked.label not in names:
            raise UserError(f"label: '{asked.label}' is no class of the images of {asked.run}{nearest(asked.label, names)}; "
                            f"its classes are {', '.join(names[:20])}")
        self._class = names.index(asked.label)

    def judge(self, images: Tensor) -> Tensor:
        """From 0 to 1."""
        import torch

        with torch.no_grad():
            self._network.to(images.device)
            scores = self._network.head(self._network(images.float()))
        if self.asked.what == "is":
            return (scores.argmax(1) == self._class).double()
        return scores.double().softmax(1)[:, self._class]
