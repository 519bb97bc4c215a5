"""The contract that lets one loop train everything: an objective holds networks by name and lists the phases of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.data.lanes import Data, Sample
from genscale.rng import Draws

Networks = Mapping[str, nn.Module]
Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One part of a step: trains ONE network on one loss.

    Attributes:
        name: unique in the objective; prefixes the metrics when there are several phases.
        network: name of the network it trains; all others are frozen meanwhile.
        loss: pure function of (networks, micro-batch, draws). Returns named weighted terms, each a scalar in fp32 that is the
            SUM over the micro-batch; the trainer divides by the global count, so that no mean of means arises.
        count: number of units in a micro-batch that the sums run over (valid tokens, or samples).
        repeats: how many times in a step it runs, each on a global batch of its own.
        every: runs only in steps divisible by this (lazy regularisation).
    """

    name: str
    network: str
    loss: Callable[[Networks, Batch, Draws], Terms]
    count: Callable[[Batch], int]
    repeats: int = 1
    every: int = 1


class Objective(ABC):
    """What a step minimises. Subclasses hold plain modules; they know nothing of ranks, wrappers or optimizers."""

    networks: dict[str, nn.Module]
    phases: Sequence[Phase]
    unit: str = "samples"  # the clock shown beside steps: what `units_per_sample` counts
    units_per_sample: int = 1

    @abstractmethod
    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """Reads a network's initial weights: a parameter's name to its full value, fp32 on the CPU. Networks may stand on the
        meta device; whoever holds a part of them asks for the tensors one at a time."""

    def flops_per_unit(self) -> int | None:
        """Floating-point operations of forward and backward for one unit, or None where that is not known."""
        return None

    @abstractmethod
    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums over one batch of the validation set (fp32 or fp64 scalars); added up over all batches and ranks."""

    @abstractmethod
    def summarise(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Metrics from the totals of `evaluate`. Must hold `loss`, by which the best checkpoint is chosen (lower is better)."""

    def save_assets(self, folder: Path) -> None:
        """Write what `Family.restore` needs besides weights and config (a tokenizer) to the run folder."""

    def use_assets(self, config: Any, folder: Path) -> None:
        """Point the config at the assets of the run folder, for evaluating the trained run on other data."""

    @abstractmethod
    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        """A small sample to log. Runs on every rank alike (a sharded forward is collective)."""


@dataclass(frozen=True)
class Family:
    """A registry entry: what `model.family` selects.

    Attributes:
        model_settings, data_settings: the dataclasses behind the `model` and `data` sections.
        build_data: (data settings, seed) -> data.
        validation: (data settings, seed) -> the validation samples; of what is trained on, no more is opened than they need.
        build_objective: (config, data) -> objective; networks on the meta device or anywhere. Raises UserError.
    """

    model_settings: type
    data_settings: type
    build_data: Callable[[Any, int], Data]
    validation: Callable[[Any, int], list[Sample]]
    build_objective: Callable[[Any, Any], Objective]
    restore: Callable[[Any, Path], Objective]
