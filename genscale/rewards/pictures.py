"""Rewards of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genscale.errors import UserError, nearest
from genscale.rewards.base import ImageReward
from genscale.rewards.picture_settings import BrightnessSettings, ClassifiedSettings
from genscale.rewards.runs import image_classifier

if TYPE_CHECKING:
    from torch import Tensor


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


class Classified(ImageReward):
    """Whether a classifier takes the picture for one of the wished class."""

    settings = ClassifiedSettings

    def __init__(self, asked: ClassifiedSettings) -> None:
        super().__init__(asked)
        self._network: Any
        self._network, names = image_classifier(asked.run)
        self._choose(names)

    def _choose(self, names: list[str]) -> None:
        asked = self.asked
        if asked.label not in names:
            raise UserError(f"label: '{asked.label}' is no class of the images of {asked.run}{nearest(asked.label, names)}; "
                            f"its classes are {', '.join(names[:20])}")
        self._class = names.index(asked.label)

    def identity(self) -> str | None:
        """SHA-256 of the classifier's weights."""
        digest: str = self._network.identity()
        return digest

    def scores(self, images: Tensor) -> Tensor:
        """Logits of the classes, `(batch, classes)`."""
        self._network.to(images.device)
        return self._network.head(self._network(images.float()))

    def judge(self, images: Tensor) -> Tensor:
        """From 0 to 1."""
        import torch

        with torch.no_grad():
            scores = self.scores(images)
        if self.asked.what == "is":
            return (scores.argmax(1) == self._class).double()
        return scores.double().softmax(1)[:, self._class]
