"""Objectives for tests of training alone: no family, no settings, networks of a few hundred weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.data.lanes import Sample
from genscale.models.image_layers import InitialWeights
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.rng import Draws

NOISE = 4
"""Numbers that a generator makes a point of."""


def point(number: int) -> Sample:
    """A point in the plane that only its number decides, `{"x": float32 (2,)}`; for `ToyData(point)`."""
    return {"x": np.array([math.sin(number), math.cos(2 * number)], np.float32)}


class BareObjective(Objective):
    """An objective that is not evaluated and shows nothing: what it trains, and how.

    Args:
        networks: by name, with the weights to begin with or on the meta device.
        phases: of a step.

    Example:
        >>> import torch
        >>> from genscale.objectives.base import Phase
        >>> from genscale.testing.objectives import BareObjective
        >>> def loss(networks, batch, draws):
        ...     return {"error": (networks["net"](batch["x"]) - batch["x"]).square().sum()}
        >>> objective = BareObjective({"net": torch.nn.Linear(2, 2)}, [Phase("net", "net", loss, BareObjective.count)])
        >>> tuple(objective.initial_weights("net")("bias").shape)
        (2,)
    """

    def __init__(self, networks: Mapping[str, nn.Module], phases: Sequence[Phase] = ()) -> None:
        self.networks, self.phases = dict(networks), phases

    @staticmethod
    def count(batch: Batch) -> int:
        """Samples of a micro-batch; those that are `valid`, where it says which are."""
        return int(batch["valid"].sum()) if "valid" in batch else len(batch["sample"])

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """Drawn for a network on the meta device; those that it has, for another."""
        network = self.networks[name]
        if any(parameter.is_meta for parameter in network.parameters()):
            return InitialWeights(network, 0)
        return network.state_dict().__getitem__

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Nothing."""
        return {}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """A loss of 0."""
        return {"loss": 0.0}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        """Nothing."""
        return ""


class ToyGAN(BareObjective):
    """Two networks that train against each other: `generator` and `discriminator`, on points `x`, `(batch, 2)`.

    Args:
        width: of the hidden layers.
        norm: makes a layer of its width that stands before the activation.
        repeats: how often the discriminator is trained in a step.
        regularise_every: steps between those of a regulariser; 0: none.
    """

    def __init__(self, width: int = 8, norm: Callable[[int], nn.Module] = lambda width: nn.Identity(), repeats: int = 1,
                 regularise_every: int = 0) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            networks = {"generator": nn.Sequential(nn.Linear(NOISE, width), norm(width), nn.Tanh(), nn.Linear(width, 2)),
                        "discriminator": nn.Sequential(nn.Linear(2, width), norm(width), nn.Tanh(), nn.Linear(width, 1))}
        lazy = [Phase("regularise", "discriminator", self.regularise, self.count, every=regularise_every)]
        super().__init__(networks, [
            Phase("discriminate", "discriminator", self.discriminate, self.count, repeats, statistics=frozenset({"logit"})),
            *(lazy if regularise_every else []), Phase("generate", "generator", self.generate, self.count)])

    def discriminate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """Non-saturating; not detached on purpose, for a frozen network gets no gradient whatever an objective does."""
        networks["generator"].eval()  # a frozen network's statistics must not move
        real, fake = (networks["discriminator"](x).float() for x in (batch["x"], self.made(networks, draws)))
        values = {"real": F.softplus(-real), "fake": F.softplus(fake), "logit": real.detach()}
        return {name: _sum(value, batch) for name, value in values.items()}

    def regularise(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The squares of its answers to real points."""
        return {"penalty": _sum(networks["discriminator"](batch["x"]).float().square(), batch)}

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """Non-saturating."""
        networks["discriminator"].eval()
        return {"loss": _sum(F.softplus(-networks["discriminator"](self.made(networks, draws)).float()), batch)}

    def made(self, networks: Networks, draws: Draws) -> Tensor:
        """Points, `(batch, 2)`."""
        points: Tensor = networks["generator"](draws.normal("noise", NOISE))
        return points


def _sum(values: Tensor, batch: Batch) -> Tensor:
    return (values[batch["valid"]] if "valid" in batch else values).sum()
