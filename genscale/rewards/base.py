"""The contract of a reward: what is judged, and what a judge gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # a config is read, and rewards are listed, without waiting for torch
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


@dataclass(frozen=True)
class NoSettings:
    """A reward that leaves nothing to choose."""


class Reward:
    """What judges. It is built from typed settings, is called by every process for the samples it holds, and must not depend on
    which stand together.

    Args:
        asked: an instance of `settings`.

    Attributes:
        settings: dataclass of what a config may say of it beside `name` and `weight`; each field has a default, or must be
            given, and a docstring. What is wrong with a value is a UserError of its `__post_init__`, "<field>: <why>".
        repeatable: whether it judges the same whenever it is asked; what one says that may not is written down before use.
        progress: tells the run's watchdog what a judge that takes its time is at; a run puts its own here.

    Raises:
        UserError: what it needs is not there; "<field>: <why>".
    """

    settings: ClassVar[type] = NoSettings
    repeatable: bool = True

    def __init__(self, asked: Any = None) -> None:
        self.asked = asked
        self.progress: Callable[[str], None] = lambda doing: None

    def identity(self) -> str | None:
        """SHA-256 of the trained network that it asks: a run goes on with no other. None where it asks none, or one of the
        objective's own."""
        return None

    def close(self) -> None:
        """End what it has started."""


class TextReward(Reward, ABC):
    """A reward of texts."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a prompt's row that it reads."""
        return ()

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> Sequence[float]:
        """What each answer is worth."""


class ImageReward(Reward, ABC):
    """A reward of pictures."""

    @abstractmethod
    def judge(self, images: Tensor) -> Tensor:
        """What each picture is worth, `(batch,)`, of images fp32 `(batch, channels, height, width)` in [0, 1]."""
