"""What an objective can do besides training: the members that samplers, scorers and verbs may ask of it.

A family names those of its objective (`Family.capabilities`; those that its `Sampling` and `Scoring` need count as named), and
they are looked for when the objective is built, before the first step. What a family does not name nobody asks it for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a registry entry names these, and must not wait for torch
    from torch import Tensor

    from genscale.data.text.tokenizers import Tokenizer
    from genscale.objectives.base import Batch, Networks
    from genscale.objectives.likelihoods import Measures


class WritesText(Protocol):
    """One of its networks, a `GPT`, continues text.

    Attributes:
        tokenizer: what makes tokens of text, and text of tokens.
        writes: name of the network.
    """

    tokenizer: Tokenizer
    writes: str


class Generates(Protocol):
    """It makes samples of standard normal latents.

    Attributes:
        latent_shape: of one latent.
    """

    latent_shape: tuple[int, ...]

    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        """Samples fp32 `(batch, *shape)` of latents `(batch, *latent_shape)`."""


class GeneratesImages(Protocol):
    """It makes images of standard normal latents.

    Attributes:
        latent_shape: of one latent.
        image_shape: `(channels, size, size)` of one image.
        class_names: of a run that is conditional on classes, in the order of their numbers; else None.
    """

    latent_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    class_names: list[str] | None

    def generate(self, networks: Networks, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images fp32 `(batch, *image_shape)` in [0, 1] of latents `(batch, *latent_shape)` and, where the run is conditional,
        classes, int64 `(batch,)`."""


class EncodesImages(Protocol):
    """It finds the latents of images."""

    def encode(self, networks: Networks, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the posterior, each `(batch, *latent_shape)`, of uint8 images."""


class MeasuresLikelihood(Protocol):
    """It estimates the likelihood of images."""

    def log_likelihood(self, networks: Networks, batch: Batch, samples: int) -> Tensor:
        """Nats fp64 `(batch,)` of the images of a batch, by so many importance samples each."""

    def measures_of(self, images: Tensor) -> Measures:
        """What sums of nats are called, of these uint8 images."""


def missing_members(capability: type, objective: Any) -> list[str]:
    """Names of the members of a capability that the objective has not."""
    members: dict[str, None] = {}
    for part in reversed(capability.__mro__):
        if part not in (object, Protocol) and getattr(part, "_is_protocol", False):
            members |= dict.fromkeys([*vars(part).get("__annotations__", {}), *(n for n in vars(part) if n[0] != "_")])
    return [name for name in members if not hasattr(objective, name)]
