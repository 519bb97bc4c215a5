"""A network and a loss of one's own as a family: one network, one phase, initial weights as the module was constructed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from genscale.data.lanes import Data, Sample
from genscale.data.loader_settings import LoaderSettings
from genscale.errors import UserError
from genscale.families.entry import PREVIEW_SAMPLING, Family, NoSettings
from genscale.models.batch_norm import BatchNorm
from genscale.models.device_kind import is_planned
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.rng import Draws
from genscale.settings.config import Config

NETWORK = "network"
"""The name of the one network, in checkpoints too."""
Loss = Callable[[nn.Module, Batch, Draws], Tensor | Mapping[str, Tensor]]
Count = Callable[[Batch], int]
Preview = Callable[[nn.Module, int, torch.device], str | np.ndarray]


class SimpleObjective(Objective):
    """Trains one network on the mean of one loss over the global batch.

    Args:
        network: the module, with the weights to begin with; every process begins with those of the first. Dropout of torch is
            refused, whose masks belong to no sample; so is BatchNorm, whose statistics would be each process's own (use
            `genscale.models.batch_norm.BatchNorm`, or GroupNorm).
        loss: of `(network, batch, draws)`, one value for each sample, `(batch,)`; or, with `count`, a tensor of any values
            that are to be added up (the tokens' losses, zero where one does not count); or several of these by name, which are
            added up. Never a mean: genscale divides by the number in the global batch, so that no mean of means arises. The
            network may stand in a wrapper: it can be called, and nothing else. Random numbers are
            `draws.normal("name", *shape)` and `draws.uniform("name", *shape)`, `(batch, *shape)`.
        count: how many values of a batch count (default: its samples).
        seed: the run's, for what an evaluation draws.
        preview: makes a sample to log, of `(network, seed, device)`: text, or a picture, uint8 `(height, width, 3)`.
        unit, loss_unit: the clock shown beside steps, and what the loss is in.
        averaged: whether samples are made with averaged weights (`train.ema_half_life`).

    Raises:
        UserError: a network with a layer that would make another run of it on several processes.

    Example:
        >>> import torch
        >>> from genscale.families.own import SimpleObjective
        >>> def loss(network, batch, draws):
        ...     return (network(batch["x"]) - batch["y"]).square().mean(1)
        >>> objective = SimpleObjective(torch.nn.Linear(2, 1), loss)
        >>> batch = {"x": torch.ones(4, 2), "y": torch.ones(4, 1), "sample": torch.arange(4)}
        >>> sorted(objective.evaluate(objective.networks, batch))
        ['loss', 'units']
    """

    def __init__(self, network: nn.Module, loss: Loss, *, count: Count | None = None, seed: int = 0,
                 preview: Preview | None = None, unit: str = "samples", loss_unit: str = "loss per sample",
                 averaged: bool = True) -> None:
        _check_layers(network)
        self.networks = {NETWORK: network}
        self.unit, self.loss_unit, self.averaged = unit, loss_unit, (NETWORK,) if averaged else ()
        self._loss, self._count, self._seed, self._preview = loss, count, seed, preview
        self.couples_samples = any(isinstance(layer, BatchNorm) for layer in network.modules())
        self._proved = False
        self.phases = [Phase(NETWORK, NETWORK, loss=self.loss, count=self.count)]

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The weights that the module was constructed with."""
        weights = {key: tensor.detach() for key, tensor in self.networks[name].state_dict().items()}
        return lambda key: weights[key]

    def count(self, batch: Batch) -> int:
        """Values of a micro-batch that count."""
        return int(self._count(batch)) if self._count else len(batch["sample"])

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The sums of the loss's values. Raises UserError where they are a mean, or depend on unaddressed random numbers."""
        if self._proved or is_planned():
            return self._sums(networks[NETWORK], batch, draws)
        before = _random_state(draws.device)
        terms = self._sums(networks[NETWORK], batch, draws)
        if not torch.equal(before, _random_state(draws.device)):
            layers = ", ".join(name for name, layer in networks[NETWORK].named_modules() if _drops(layer))
            raise UserError(f"loss: the network or its loss draws random numbers of torch{f' (in {layers})' if layers else ''}"
                            ", which belong to no sample: another number of processes, or a resume, would be another run; set "
                            "dropout to 0, or take the numbers from `draws`")
        self._proved = True
        return terms

    def _sums(self, network: nn.Module, batch: Batch, draws: Draws) -> Terms:
        values = self._loss(network, batch, draws)
        named = values if isinstance(values, Mapping) else {"loss": values}
        samples = len(batch["sample"])
        for name, value in named.items():
            if value.ndim == 0 or (self._count is None and value.shape != (samples,)):
                wanted = "the values to add up" if self._count else f"one value a sample, ({samples},)"
                raise UserError(f"loss: '{name}' is of shape {tuple(value.shape)}; it must be {wanted}, not their mean or sum "
                                "(reduction='none')")
        return {name: value.float().sum() for name, value in named.items()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums of the loss, and how many values they are of; what it draws belongs to the sample's number."""
        device = next(value.device for key, value in batch.items() if key != "sample")
        terms = self._sums(networks[NETWORK], batch, Draws(self._seed, "validation", 0, batch["sample"], device))
        return {**terms, "loss": reduce(add, terms.values()), "units": torch.tensor(float(self.count(batch)))}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """The mean of the loss, and of each of its terms."""
        return {name: value / max(totals["units"], 1) for name, value in totals.items() if name != "units"}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str | np.ndarray:
        """What the user's `preview` makes, or an empty text."""
        return self._preview(networks[NETWORK], seed, device) if self._preview else ""


def _check_layers(network: nn.Module) -> None:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"network: layer '{name}' is {type(layer).__name__}, whose statistics would be each process's own; "
                            "use genscale.models.batch_norm.BatchNorm, or nn.GroupNorm")


def _drops(layer: nn.Module) -> bool:
    share = getattr(layer, "p", 0) if isinstance(layer, nn.modules.dropout._DropoutNd) else getattr(layer, "dropout", 0)
    return isinstance(share, (int, float)) and share > 0


def _random_state(device: str | torch.device) -> Tensor:
    device = torch.device(device)
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def make_family(name: str, *, network: Callable[[Any], nn.Module], loss: Loss, data: Callable[[Any, int], Data],
                model_settings: type = NoSettings, data_settings: type = LoaderSettings,
                sample: Callable[[Any], Mapping[str, Tensor]] | None = None, **options: Any) -> Family:
    """A family of one's own, of a network, a loss and data: what `genscale.register` and the entry points take.

    Args:
        name: what `model.family` calls it.
        network: makes the module of the `model` settings, with the weights to begin with. It is called with torch's random
            numbers seeded with the run's seed.
        loss: see `SimpleObjective`.
        data: makes a `Data` (`MapData`, `ShardData`) of the `data` settings and the run's seed.
        model_settings, data_settings: dataclasses of the sections `model` and `data`, where the family has settings. Those of
            the data inherit from `LoaderSettings`.
        sample: gives a sample of the `data` settings by shape and type, tensors on the meta device, so that a run can be
            planned without data (`genscale plan`).
        options: further arguments of `SimpleObjective` (`count`, `preview`, `unit`, ...).

    Raises:
        TypeError: settings that are no dataclass, or data settings that do not inherit from `LoaderSettings`.
    """
    if not dataclasses.is_dataclass(model_settings) or not issubclass(data_settings, LoaderSettings):
        raise TypeError("model_settings must be a dataclass, and data_settings one that inherits from LoaderSettings")

    def objective(config: Config) -> SimpleObjective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            return SimpleObjective(network(config.model), loss, seed=config.run.seed, **options)

    def build(config: Config, _data: Data) -> SimpleObjective:
        return objective(config)

    def restore(config: Config, _folder: Path) -> SimpleObjective:
        return objective(config)

    def validation(settings: Any, seed: int) -> list[Sample]:
        opened = data(settings, seed)
        try:
            return opened.validation()
        finally:
            opened.close()

    module = SimpleNamespace(__name__=name, build_data=data, validation=validation, build=build, restore=restore)
    if sample is not None:
        module.blueprint = lambda config: Blueprint(objective(config), sample(config.data))
    sampling = PREVIEW_SAMPLING if options.get("preview") else None
    return Family(_with_family(model_settings, name), data_settings, lambda: module, sampling=sampling)


def _with_family(settings: type, name: str) -> type:
    """The model's settings with `family`, by which a config says whose they are."""
    field = ("family", Literal[name], dataclasses.field(default=name))
    frozen = settings.__dataclass_params__.frozen  # type: ignore[attr-defined]
    made = dataclasses.make_dataclass(settings.__name__, [field], bases=(settings,), frozen=frozen)
    made.__doc__, made.__module__ = settings.__doc__, settings.__module__
    return made
