"""The smallest family that there can be, whole in one file: for tests, for benchmarks, and to be read by who writes one.

A network removes noise from short waves. The settings, the data, the objective, the functions of a family's module, a sampler,
and the entry that holds them together follow each other here; a family of any size has these parts and no others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from genscale.data.lanes import Cursor, Data, Sample
from genscale.evaluation.trained_run import TrainedRun
from genscale.families.entry import Family, Sampling
from genscale.models.initial_weights import InitialWeights
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.objectives.capabilities import Generates
from genscale.rng import Draws
from genscale.settings.config import Config

LENGTH = 16
"""Values in a wave."""


@dataclass
class ToySettings:
    """What the network is."""

    family: Literal["toy"] = "toy"
    """What is trained."""
    width: PositiveInt = 16
    """Width of the hidden layer."""


@dataclass
class ToyDataSettings:
    """Waves to train on; they are computed as they are needed."""

    noise: PositiveFloat = 0.5
    """Standard deviation of the noise that is to be removed."""
    lanes: PositiveInt = 12
    """Parallel streams that make up the sample order."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""


@dataclass
class ToySampling:
    """What to make."""

    count: PositiveInt = 2
    """Waves."""
    seed: NonNegativeInt = 0
    """Same seed, same waves."""


class ToyData(Data):
    """Endless samples, of which number g is a function of g alone.

    Args:
        sample: makes a sample of its number, those of validation of numbers below 0.
        lanes: parallel streams that make up the order.

    Example:
        >>> from genscale.testing.toy import ToyData
        >>> sample, cursor = next(ToyData(lanes=4).open_lane(1))
        >>> sample["wave"].shape, cursor
        ((16,), {'position': 1})
    """

    def __init__(self, sample: Callable[[int], Sample] | None = None, lanes: int = 12) -> None:
        self.sample, self.lane_count = sample or wave_sample, lanes

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        position = 0 if cursor is None else cursor["position"]
        while True:
            yield self.sample(position * self.lane_count + lane), {"position": position + 1}
            position += 1

    def validation(self) -> list[Sample]:
        return [self.sample(-1 - number) for number in range(8)]

    def check(self, global_batch_size: int) -> None:
        """There are always enough."""

    def plan(self) -> dict[str, Any]:
        return {"lanes": self.lane_count}

    def close(self) -> None:
        """Nothing is open."""


def wave_sample(number: int) -> Sample:
    """The sample of a number, `{"wave": float32 (16,)}`."""
    return {"wave": wave(number)}


def wave(number: int) -> np.ndarray:
    """Wave of a number, float32 `(16,)`."""
    return np.sin(np.arange(LENGTH) * (0.2 + 0.6 * abs(math.sin(number))) + number).astype(np.float32)


class ToyObjective(Objective):
    """Trains `net` to find a wave in its noisy copy. A batch holds `wave`, float32 `(batch, 16)`.

    Args:
        network: noisy waves `(batch, 16)` -> waves.
        noise: standard deviation.
        seed: the run's.
    """

    loss_unit = "squared error"
    averaged = ("net",)
    latent_shape = (LENGTH,)

    def __init__(self, network: nn.Module, noise: float, seed: int) -> None:
        self.networks = {"net": network}
        self.noise, self.seed = noise, seed
        self.phases = [Phase("toy", "net", self.loss, self.count)]
        self._weights = InitialWeights(network, seed)

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The initial draw."""
        return self._weights

    def count(self, batch: Batch) -> int:
        """Waves of a micro-batch."""
        return len(batch["wave"])

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """Squared error, summed over the waves."""
        noisy = batch["wave"] + self.noise * draws.normal("noise", LENGTH)
        return {"error": (networks["net"](noisy) - batch["wave"]).square().sum()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums over a batch: the squared error, and the waves. The noise belongs to a wave's number."""
        draws = Draws(self.seed, "validation", 0, batch["sample"], batch["wave"].device)
        return {"error": self.loss(networks, batch, draws)["error"].double(),
                "waves": torch.tensor(float(self.count(batch)), device=batch["wave"].device)}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """The mean squared error of a wave."""
        return {"loss": totals["error"] / totals["waves"]}

    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        """What the network sees in noise, fp32 `(batch, 16)`."""
        return networks["net"](latents).float()

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        """A wave in numbers."""
        drawn = Draws(seed, "preview", 0, torch.arange(1), device).normal("latent", LENGTH)
        return " ".join(f"{value:.2f}" for value in self.generate(networks, drawn)[0].tolist())


def build_data(settings: ToyDataSettings, seed: int) -> ToyData:
    return ToyData(lanes=settings.lanes)


def validation(settings: ToyDataSettings, seed: int) -> list[Sample]:
    return ToyData().validation()


def network_of(config: Config) -> nn.Module:
    """On the meta device: the engine fills the parameters, or its share of them, from `initial_weights`."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(LENGTH, config.model.width), nn.Tanh(), nn.Linear(config.model.width, LENGTH))


def build(config: Config, data: Data) -> ToyObjective:
    return restore(config)


def restore(config: Config, folder: Path | None = None) -> ToyObjective:
    return ToyObjective(network_of(config), config.data.noise, config.run.seed)


@torch.no_grad()
def sample(run: TrainedRun, settings: ToySampling) -> None:
    """Print waves, one a line."""
    drawn = Draws(settings.seed, "generate", 0, torch.arange(settings.count), run.device).normal("latent", LENGTH)
    for line in run.objective.generate(run.objective.networks, drawn).tolist():  # type: ignore[attr-defined]
        print(" ".join(f"{value:.3f}" for value in line))


FAMILY = Family(ToySettings, ToyDataSettings, module=lambda: sys.modules[__name__],
                sampling=Sampling(ToySampling, lambda: sample, needs=(Generates,)), tiny={"model.width": 8})
