"""Points on a ring, coded in two numbers and back: a family in a package of its own."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import genscale

ANGLES = np.linspace(0, 2 * np.pi, 600, endpoint=False)
POINTS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1).astype(np.float32)


@dataclass
class Rings:
    """A denoiser of points on a ring."""

    width: int = 16
    """Width of the hidden layer."""


@dataclass
class RingData(genscale.LoaderSettings):
    """Points on a ring."""

    radius: float = 1.0
    """Of the ring."""


def network(model: Rings) -> nn.Module:
    return nn.Sequential(nn.Linear(2, model.width), nn.Tanh(), nn.Linear(model.width, 2))


def loss(network, batch, draws):
    noise = 0.1 * draws.normal("noise", 2)
    return (network(batch["x"] + noise) - batch["x"]).square().sum(1)


def points(radius: float) -> torch.Tensor:
    return torch.from_numpy(radius * POINTS)


family = genscale.make_family("rings", network=network, loss=loss, model_settings=Rings, data_settings=RingData, unit="points",
                              data=lambda data, seed: genscale.MapData(points(data.radius), validation=100, seed=seed))
