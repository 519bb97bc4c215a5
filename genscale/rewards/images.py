"""Rewards of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genscale.errors import UserError, nearest
from genscale.rewards.base import ImageReward

if TYPE_CHECKING:
    from torch import Tensor


class Brightness(ImageReward):
    """How bright a picture is: the mean of its pixels, from 0 (black) to 1 (white)."""

    def judge(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1)


@dataclass(frozen=True)
class WantedClassSettings:
    """What is wanted."""

    label: str
    """The class, by name."""


class WantedClass(ImageReward):
    """1 where a classifier finds the wanted class in a picture, else 0. The classifier is one of the pictures that the policy's
    generator was trained on, a frozen network of the objective, which `begin` and `classify` connect."""

    settings = WantedClassSettings
    classify: Callable[[Tensor], Tensor]
    """Logits `(batch, classes)` of images; put there by the objective."""

    def begin(self, names: Sequence[str], key: str) -> None:
        """The classifier knows these classes. Raises UserError where the wanted one is not among them."""
        if self.asked.label not in names:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(f"{key}: {self.asked.label!r} is no class of the pictures{nearest(self.asked.label, names)}; they "
                            f"have {shown}")
        self._number = list(names).index(self.asked.label)

    def judge(self, images: Tensor) -> Tensor:
        return (self.classify(images).argmax(1) == self._number).float()
