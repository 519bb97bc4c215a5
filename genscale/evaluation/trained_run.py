"""A trained run as samplers and scorers get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from genscale.objectives.base import Objective
from genscale.settings.config import Config


@dataclass(frozen=True)
class TrainedRun:
    """The networks are filled, on `device` and in evaluation mode.

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
