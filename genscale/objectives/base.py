"""The contract that lets one loop train everything: an objective holds networks by name and lists the phases of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genscale.rng import Draws
from genscale.settings.config import Config

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
        second_order: takes gradients of gradients (gradient penalties): computed in fp32, on the plain modules.
        statistics: names among the terms that are logged and are no part of the loss.
    """

    name: str
    network: str
    loss: Callable[[Networks, Batch, Draws], Terms]
    count: Callable[[Batch], int]
    repeats: int = 1
    every: int = 1
    second_order: bool = False
    statistics: frozenset[str] = frozenset()


class Objective(ABC):
    """What a step minimises. Subclasses hold plain modules; they know nothing of ranks, wrappers or optimizers.

    Attributes:
        unit, units_per_sample: the clock shown beside steps, and how much of it a sample is.
        loss_unit: of `summarise`'s `loss`, for the plot.
        higher_is_better: metrics of `summarise` of which this is true.
        averaged: networks that samples are made with: `train.ema_half_life` averages their weights.
        couples_samples: a loss depends on which samples share a micro-batch (batch normalisation, packing): the number of
            micro-batches in a step is then part of the run.
    """

    networks: dict[str, nn.Module]
    phases: Sequence[Phase]
    unit: str = "samples"
    units_per_sample: int = 1
    loss_unit: str = "nats per token"
    higher_is_better: frozenset[str] = frozenset()
    averaged: Sequence[str] = ()
    couples_samples: bool = False

    @abstractmethod
    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """Reads a network's initial weights: the name of a parameter or persistent buffer to its full value, fp32 on the CPU.
        Networks may stand on the meta device; whoever holds a part of them asks for the tensors one at a time."""

    def flops_per_unit(self) -> int | None:
        """Floating-point operations of forward and backward for one unit, or None where that is not known."""
        return None

    @abstractmethod
    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums over one batch of the validation set (fp32 or fp64 scalars), added up over all batches and ranks; and values by
        sample, `(batch, ...)`, which are joined in the order of the samples. The batch holds `sample`, int64 `(batch,)`: the
        samples' numbers in the validation set, to address draws by."""

    @abstractmethod
    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Metrics from the totals of `evaluate`: a float where it gave sums, a fp32 tensor `(samples, ...)` on the CPU where it
        gave values by sample. Must hold `loss`, by which the best checkpoint is chosen (lower is better)."""

    def save_assets(self, folder: Path) -> None:
        """Write what `Family.restore` needs besides weights and config (a tokenizer) to the run folder."""

    def use_assets(self, config: Config, folder: Path) -> Config:
        """The config with the assets of the run folder, for evaluating the trained run on other data."""
        return config

    @abstractmethod
    def preview(self, networks: Networks, seed: int, device: torch.device) -> str | np.ndarray:
        """A small sample to log: text, or a picture, uint8 `(height, width, 3)`. Runs on every rank alike (a sharded forward is
        collective)."""
