"""The toy family, and families that break the promise, each in one way."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from genscale.families.entry import Family
from genscale.families.own import _with_family
from genscale.objectives.base import Batch, Networks, Terms
from genscale.rng import Draws
from genscale.testing import toy


class Chance(toy.ToyObjective):
    """Its noise comes from torch's own random state."""

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        noisy = batch["wave"] + self.noise * torch.randn_like(batch["wave"])
        return {"error": (networks["net"](noisy) - batch["wave"]).square().sum()}


class Means(toy.ToyObjective):
    """Its term is the mean of a micro-batch."""

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        return {"error": toy.LENGTH * super().loss(networks, batch, draws)["error"] / self.count(batch)}


class Widening(toy.ToyObjective):
    """A layer of it gives fp32 to weights that may be held in bf16."""

    def __init__(self, network: nn.Module, noise: float, seed: int) -> None:
        super().__init__(nn.Sequential(Widen(), network), noise, seed)


class Widen(nn.Module):
    def forward(self, waves: Tensor) -> Tensor:
        return waves.float()


def built(kind: type[toy.ToyObjective]) -> Family:
    def restore(config: Any, _: Any = None) -> toy.ToyObjective:
        return kind(toy.network_of(config), config.data.noise, config.run.seed)

    module = SimpleNamespace(build_data=toy.build_data, validation=toy.validation, build=restore, restore=restore)
    return replace(toy.FAMILY, model_settings=_with_family(toy.ToySettings, kind.__name__.lower()), module=lambda: module)


FAMILIES = {family.name: family for family in (toy.FAMILY, *map(built, (Chance, Means, Widening)))}
