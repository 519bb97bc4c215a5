"""The contract of a reward: what is judged, and what a judge gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """A text that a policy wrote.

    Attributes:
        prompt: what it was asked.
        text: what it wrote, without the token that ends the text.
        row: the columns of the prompt's row in the data, so that a reward finds what is right there.
        ended: whether it ended its text itself, and was not cut at `objective.tokens`.
        sample: number of the prompt in the run's one global order.
        member: number of the answer among those to this prompt.
    """

    prompt: str
    text: str
    row: Mapping[str, Any]
    ended: bool
    sample: int
    member: int


class Reward(ABC):
    """What judges. It is built from typed settings (a dataclass), is called by every process for the samples it holds, and must
    not depend on which stand together.

    Attributes:
        settings: dataclass of what a config may say of it beside `name` and `weight`.
        repeatable: whether it gives the same judgement whenever it is asked; what another one says is written down before it is
            used.
    """

    settings: type
    repeatable: bool = True


class TextReward(Reward):
    """A reward of texts."""

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Sequence[float]:
        """What each answer is worth."""


class ImageReward(Reward):
    """A reward of pictures."""

    @abstractmethod
    def judge(self, images: Tensor) -> Tensor:
        """What each picture is worth, `(batch,)`, of images fp32 `(batch, channels, height, width)` in [0, 1]."""
