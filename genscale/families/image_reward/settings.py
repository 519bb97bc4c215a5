"""The `model` and `objective` sections of the family `image_reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from genscale.rewards.entries import completed


@dataclass(frozen=True)
class ImageRewardSettings:
    """What is improved by reward, and where it begins."""

    family: Literal["image_reward"] = "image_reward"
    """Kind of model."""
    from_: str | None = None
    """The run to begin from, a vae, vae_gan or dcgan: its folder, or one of its checkpoints. It is needed when the run begins,
    and not again."""
    policy: Literal["latent", "decoder"] = "latent"
    """latent: a flow draws latents, of which the frozen decoder or generator makes pictures; the reference is the normal
    distribution. decoder: the decoder of a vae is trained; the reference is the decoder as it was, frozen."""
    layers: PositiveInt = 8
    """latent: layers of the flow, each of which moves latents along one direction."""
    width: PositiveInt = 64
    """latent: units in the hidden layers of such a layer."""
    label: str | None = None
    """latent, of a run that is conditional on classes: draw this class alone (default: the policy draws the class too, and
    begins with all of them alike)."""
    started: dict[str, Any] | None = None
    """What the run was that this one began from: filled in when it begins."""


@dataclass(frozen=True)
class ImageRewardObjectiveSettings:
    """What is maximised: reward - beta x divergence from the reference."""

    group: PositiveInt = 8
    """Pictures in a sample, the mean reward of the others of which is each one's baseline; at least 2."""
    beta: PositiveFloat = 0.2
    """What a nat of divergence from the reference costs, in units of reward. The best policy is the reference, weighted by
    exp(reward / beta)."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """What is judged, added up: entries {name: ..., weight: 1, ...}; `genscale rewards` lists the names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", completed(self.rewards))


@dataclass(frozen=True)
class DrawnDataSettings:
    """Nothing is read: a sample is a number, by which all of it is drawn."""

    validation_groups: PositiveInt = 128
    """Groups that an evaluation draws, and as many of the reference."""
    lanes: PositiveInt = 48
    """Parallel streams that make up the sample order."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""
