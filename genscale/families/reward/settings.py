"""The `model` and `objective` sections of the family `reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from genscale.families.gpt.settings import GPTSettings
from genscale.rewards.entries import completed


@dataclass(frozen=True)
class RewardSettings(GPTSettings):
    """The `model` section of a policy: where it begins. Its shape is that of what it begins from."""

    family: Literal["reward"] = "reward"  # type: ignore[assignment]
    """Kind of model."""
    from_: str | None = None
    """What the policy begins as, and stays near to: a run folder or a checkpoint of model.family gpt or reward, a Hugging Face
    folder, or a hub name; or scratch: initial weights of the shape that model.* gives."""


@dataclass(frozen=True)
class RewardObjectiveSettings:
    """What is rewarded, and what the distance from the beginning costs."""

    rewards: list[dict[str, Any]] = field(default_factory=list)
    """What an answer is worth, a sum of rewards by name: [{name: exact, weight: 1}, ...]; `genscale rewards` lists them."""
    tokens: PositiveInt = 64
    """Longest answer, with the token that ends it; a longer one is cut there, and counts as it is."""
    group: PositiveInt = 8
    """Answers to a prompt, of which each is compared with the others; at least 2."""
    beta: NonNegativeFloat = 0.02
    """Reward that a nat of divergence from the beginning costs. The best policy is the beginning's times exp(reward / beta)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", completed(self.rewards))
