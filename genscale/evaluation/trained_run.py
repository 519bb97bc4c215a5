"""A trained run as samplers and scorers get it, and `genscale.load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genscale.objectives.base import Objective
from genscale.settings.config import Config


@dataclass(frozen=True)
class TrainedRun:
    """What `genscale.load` returns: the networks of a trained run, filled, on `device` and in evaluation mode.

    Attributes:
        objective: of the run.
        config: the run's, with the settings of the command line.
        folder: the run folder.
        device: where the networks are.
        averaged: some of them hold the average of their weights.
    """

    objective: Objective
    config: Config
    folder: Path
    device: torch.device
    averaged: bool = False

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The run's networks by name, as plain modules in fp32: `networks["vae"]`."""
        return self.objective.networks

    @torch.no_grad()
    def sample(self, seed: int = 0) -> str | np.ndarray:
        """Generate a small sample, the same for the same seed: a GPT's text, or a picture of several images, uint8
        `(height, width, 3)`, as the run itself has drawn them. `genscale sample` has more to choose."""
        return self.objective.preview(self.networks, seed, self.device)
