"""What a finished (or running) run folder holds: its config, its tokenizer, the weights of a checkpoint; or what a Hugging
Face folder holds of them. For sample, evaluate and export."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints
from genscale.checkpoint.frozen_networks import find_copy
from genscale.checkpoint.tensor_files import TensorFiles
from genscale.errors import UserError
from genscale.evaluation.trained_run import TrainedRun
from genscale.families import FAMILIES, family
from genscale.interop.huggingface import open_huggingface
from genscale.objectives.base import Objective
from genscale.parallel.materialise import Read, fill, materialise, named_state
from genscale.parallel.precision import keep_fp32
from genscale.parallel.processes import on_cpu
from genscale.settings.config import Config
from genscale.settings.parser import load_config
from genscale.supervise.run_folder import config_yaml

HUGGINGFACE_CONFIG = "config.json"
"""A run has none of this name."""
LONGEST = 1024
"""Tokens of a sample of a published model at most: what it could read may be far more than a batch of them has memory for."""


@dataclass(frozen=True)
class Published:
    """A Hugging Face folder in the place of a checkpoint.

    Attributes:
        path: the folder.
        config: a run's that would hold this model.
        read: our parameter of a name, in full.
        step: none is known.
    """

    path: Path
    config: Config
    read: Read
    step: None = None

    def weights(self, name: str, averaged: bool) -> Read:
        """The weights of the one network there is."""
        return self.read


def find_trained(path: str, step: int | None = None) -> tuple[Config, Checkpoint | Published]:
    """The config and the checkpoint that a run folder or a checkpoint path means, of a run folder the latest valid
    one, or `step`'s; or the model of a Hugging Face folder.

    Raises:
        UserError: nothing there, no such step, or every checkpoint damaged.
    """
    if (Path(path) / HUGGINGFACE_CONFIG).is_file():
        published = _published(Path(path), step)
        return published.config, published
    candidates = list(find_checkpoints(Path(path)))
    if step is not None:
        chosen = [checkpoint for checkpoint in candidates if checkpoint.step == step]
        if not chosen:
            steps = ", ".join(str(checkpoint.step) for checkpoint in candidates)
            raise UserError(f"--step: {path} has no checkpoint of step {step}; it has {steps}")
        candidates = chosen
    damaged: list[str] = []
    for checkpoint in reversed(candidates):
        problem = checkpoint.problem()
        if problem is None:
            for line in damaged:
                print(f"warning: {line}; using the one before it", file=sys.stderr)
            return load_config(FAMILIES, checkpoint.path / "config.yaml"), checkpoint
        damaged.append(f"checkpoint {checkpoint.path} is damaged ({problem})")
    raise UserError(f"{'; '.join(damaged)}; there is no other")


def _published(folder: Path, step: int | None) -> Published:
    if step is not None:
        raise UserError(f"--step: {folder} is a Hugging Face folder, which holds one state of a model; leave --step out")
    fields, read = open_huggingface(str(folder))
    gpt = family("gpt")
    model = gpt.model_settings(**fields)
    data = gpt.data_settings(tokenizer=str(folder), sequence_length=min(model.positions, LONGEST))
    return Published(folder, Config(model=model, data=data), read)


def config_of(checkpoint: Checkpoint | Published, overrides: Sequence[str]) -> Config:
    """The config with settings of the command line. Raises UserError."""
    if isinstance(checkpoint, Checkpoint):
        return load_config(FAMILIES, checkpoint.path / "config.yaml", overrides)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config_yaml(checkpoint.config))
        return load_config(FAMILIES, file, overrides)


def load_weights(objective: Objective, checkpoint: Checkpoint | Published, averaged: bool = True,
                 device: torch.device | None = None) -> torch.device:
    """Put the checkpoint's weights into the objective's networks, in evaluation mode.

    Networks on the meta device get their memory there, and one tensor is read at a time: no second copy is held anywhere.

    Args:
        averaged: networks whose average the checkpoint holds get that.
        device: where to; None: the best device of this machine.

    Raises:
        UserError: the networks are of other shapes than those of the checkpoint.
    """
    device = device or torch.device("cpu" if on_cpu() else "cuda")
    keep_fp32()
    for name, network in objective.networks.items():
        try:
            weights = TensorFiles([find_copy(checkpoint, name)]) \
                if name in objective.frozen and isinstance(checkpoint, Checkpoint) else checkpoint.weights(name, averaged)
            if isinstance(weights, TensorFiles):  # before memory is asked for
                _check_shapes(network, weights.shapes())
            materialise(network, device)
            fill(network, weights)
        except (SafetensorError, ValueError) as error:  # the checkpoint's every byte is as written
            raise UserError(f"{checkpoint.path}: with settings that are not the run's its network {name} would be another one "
                            f"({error}); leave out those that shape it, such as data.size and data.channels") from None
        network.eval()
    return device


def _check_shapes(network: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError."""
    for name, tensor in named_state(network):
        if (shape := stored.get(name)) != tuple(tensor.shape):
            raise ValueError(f"{name} is {shape or 'absent'} there, not {tuple(tensor.shape)}")


def open_run(config: Config, checkpoint: Checkpoint | Published, live: bool = False,
             device: torch.device | None = None) -> TrainedRun:
    """The run's objective with its weights: averages where there are some, unless `live`.

    Raises UserError as `load_weights` does."""
    objective = family(config.model.family).restore(config, run_of(checkpoint))
    device = load_weights(objective, checkpoint, averaged=not live, device=device)
    averaged = not live and isinstance(checkpoint, Checkpoint) and any(map(checkpoint.has_average, objective.networks))
    return TrainedRun(objective, config, run_of(checkpoint), device, averaged)


def run_of(checkpoint: Checkpoint | Published) -> Path:
    """The run folder a checkpoint lies in; a Hugging Face folder keeps its tokenizer as one does."""
    return checkpoint.path if isinstance(checkpoint, Published) else checkpoint.path.resolve().parent.parent


def take_run(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """Split the RUN argument, which comes first, from the settings. Raises UserError."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"RUN is missing: a run folder or a checkpoint folder comes first ({usage})")
    if not arguments[0].strip():
        raise UserError("RUN is empty (was the variable that it comes from not set?): a run folder or a checkpoint folder "
                        f"comes first ({usage})")
    return arguments[0], arguments[1:]
