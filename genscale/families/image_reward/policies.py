"""What writes pictures, and how likely it was to: a flow before a frozen generator, or a decoder."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import UserError, nearest
from genscale.families.image_reward.flow import LatentFlow, Move, drawn_class, log_normal
from genscale.families.image_reward.halves import Coupling
from genscale.families.image_reward.settings import ImageRewardSettings
from genscale.families.vae.objective import VAEObjective
from genscale.models.image_layers import InitialWeights
from genscale.objectives.base import Networks
from genscale.objectives.likelihoods import Likelihood
from genscale.rng import Draws

Read = Callable[[str], Tensor]
Generating = Callable[[str], Any]
"""`Objective.generating`."""


@dataclass(frozen=True)
class Written:
    """Pictures, and how likely they were.

    Attributes:
        images: fp32 `(batch, group, channels, size, size)` in [0, 1].
        log_p, log_reference: under the policy and under the reference, in nats, fp32 `(batch, group)`.
    """

    images: Tensor
    log_p: Tensor
    log_reference: Tensor


class PicturePolicy(ABC):
    """A policy over pictures, and its reference.

    Attributes:
        networks: by name; `policy` is trained, all others are frozen.
        latent_shape: of the standard normal noise that a picture is made of.
        pooled: the reference is one distribution for all samples, and not another for each.
    """

    networks: dict[str, nn.Module]
    latent_shape: tuple[int, ...]
    pooled: bool

    @abstractmethod
    def initial_weights(self, name: str, source: Callable[[str], Read]) -> Read:
        """The weights that a network begins with; `source` reads those of the run's networks."""

    @abstractmethod
    def write(self, networks: Networks, draws: Draws, group: int, generating: Generating) -> Written:
        """Pictures of the policy, with gradients in `log_p`."""

    @abstractmethod
    def write_reference(self, networks: Networks, draws: Draws, group: int) -> Written:
        """Pictures of the reference."""

    @abstractmethod
    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        """Expected pictures fp32 `(batch, channels, size, size)` in [0, 1] of the policy, of noise `(batch, *latent_shape)`."""

    @abstractmethod
    def generate_reference(self, networks: Networks, latents: Tensor) -> Tensor:
        """The same of the reference."""


class LatentPolicy(PicturePolicy):
    """A flow draws the latents, and where there are classes to choose from, the class; the run's own objective makes pictures
    of them, with its frozen networks.

    Args:
        maker: objective of the run, with `generate`, `latent_shape`, `class_names`, `averaged`.
        settings: of the flow.
        seed: of its initial weights.

    Raises:
        UserError: a class that the run has not.
    """

    pooled = True

    def __init__(self, maker: Any, settings: ImageRewardSettings, seed: int) -> None:
        size, names = math.prod(maker.latent_shape), maker.class_names
        self.maker, self._label = maker, _label(settings, names)
        self.classes = len(names) if names is not None and self._label is None else 0
        layer = Coupling if settings.started is not None and "flow" not in settings.started else Move
        with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
            flow = LatentFlow(size, settings.layers, settings.width, self.classes, layer)
        self._weights = InitialWeights(flow, seed)
        self.networks = {"policy": flow, **{name: maker.networks[name] for name in maker.averaged}}
        self.latent_shape = (1 + size,) if self.classes else maker.latent_shape

    def initial_weights(self, name: str, source: Callable[[str], Read]) -> Read:
        return self._weights if name == "policy" else source(name)

    def write(self, networks: Networks, draws: Draws, group: int, generating: Generating) -> Written:
        noise = self._noise(draws, "latent", group)
        with generating("policy") as rollout:
            latents, labels = rollout.network(noise)
        return self._written(networks, latents, labels, group)

    def write_reference(self, networks: Networks, draws: Draws, group: int) -> Written:
        return self._written(networks, *self._of_reference(self._noise(draws, "reference latent", group)), group)

    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        return self._made(networks, *networks["policy"](latents.flatten(1)))

    def generate_reference(self, networks: Networks, latents: Tensor) -> Tensor:
        return self._made(networks, *self._of_reference(latents.flatten(1)))

    def _noise(self, draws: Draws, stream: str, group: int) -> Tensor:
        return draws.normal(stream, group, math.prod(self.latent_shape)).flatten(0, 1)

    def _of_reference(self, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.classes:
            return noise, None
        return noise[:, 1:], drawn_class(noise[:, 0], noise.new_zeros(self.classes))

    def _written(self, networks: Networks, latents: Tensor, labels: Tensor | None, group: int) -> Written:
        log_reference = log_normal(latents) - (math.log(self.classes) if self.classes else 0.0)
        log_p = networks["policy"](latents=latents, labels=labels)
        images = self._made(networks, latents, labels)
        return Written(*(each.unflatten(0, (-1, group)) for each in (images, log_p, log_reference)))

    @torch.no_grad()
    def _made(self, networks: Networks, latents: Tensor, labels: Tensor | None) -> Tensor:
        if self._label is not None:
            labels = torch.full((len(latents),), self._label, device=latents.device)
        return self.maker.generate(networks, latents.unflatten(1, self.maker.latent_shape), labels)


class DecoderPolicy(PicturePolicy):
    """The decoder of a VAE draws pixels of a latent, by its likelihood. A sample is a latent, which its group shares; the
    reference is the decoder as it was.

    Args:
        maker: objective of the run.
    """

    pooled = False

    def __init__(self, maker: VAEObjective) -> None:
        decoder = maker.networks["vae"].get_submodule("decoder")
        self.likelihood: Likelihood = maker.likelihood
        self.networks = {"policy": decoder, "reference": copy.deepcopy(decoder)}
        self.latent_shape, self.image_shape = maker.latent_shape, maker.image_shape

    def initial_weights(self, name: str, source: Callable[[str], Read]) -> Read:
        read = source("vae")
        return lambda key: read(f"decoder.{key}")

    def write(self, networks: Networks, draws: Draws, group: int, generating: Generating) -> Written:
        return self._written(networks, draws, group, "policy")

    def write_reference(self, networks: Networks, draws: Draws, group: int) -> Written:
        return self._written(networks, draws, group, "reference")

    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        return self.likelihood.mean(networks["policy"](latents)[0])

    def generate_reference(self, networks: Networks, latents: Tensor) -> Tensor:
        return self.likelihood.mean(networks["reference"](latents)[0])

    def _written(self, networks: Networks, draws: Draws, group: int, writer: str) -> Written:
        latents = draws.normal("latent", *self.latent_shape)
        outputs = {name: networks[name](latents) for name in ("policy", "reference")}
        spread = {name: (location[:, None], scale[:, None] if scale.ndim == 4 else scale)
                  for name, (location, scale) in outputs.items()}
        with torch.no_grad():
            pixels = self.likelihood.drawn(draws.uniform(f"{writer} pixel", group, *self.image_shape), *spread[writer])
        log_p, log_reference = (-self.likelihood.nats(pixels, *spread[name]).flatten(2).sum(2) for name in spread)
        return Written(self.likelihood.shown(pixels), log_p, log_reference)


def _label(settings: ImageRewardSettings, names: list[str] | None) -> int | None:
    if settings.label is None:
        return None
    if names is None:
        raise UserError(f"model.label: {settings.label}, but {settings.from_} is not conditional on classes; leave it out")
    if settings.label not in names:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"model.label: '{settings.label}' is no class of {settings.from_}{nearest(settings.label, names)}; it "
                        f"has {shown}")
    return names.index(settings.label)
