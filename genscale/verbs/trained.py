"""What a finished (or running) run folder holds: its config, its tokenizer, the weights of a checkpoint. For sample
and evaluate."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from genscale.config import Config
from genscale.config_parser import load_config
from genscale.errors import UserError
from genscale.objectives import FAMILIES
from genscale.objectives.base import Objective
from genscale.parallel.materialise import fill, materialise
from genscale.parallel.processes import on_cpu
from genscale.training.checkpoints import Checkpoint, find_checkpoints


def find_trained(path: str, step: int | None = None) -> tuple[Config, Checkpoint]:
    """The config and the checkpoint that a run folder or a checkpoint path means; of a run folder the latest valid
    one, or `step`'s.

    Raises:
        UserError: nothing there, no such step, or every checkpoint damaged.
    """
    candidates = list(find_checkpoints(Path(path)))
    if step is not None:
        chosen = [checkpoint for checkpoint in candidates if checkpoint.step == step]
        if not chosen:
            steps = ", ".join(str(checkpoint.step) for checkpoint in candidates)
            raise UserError(f"--step: {path} has no checkpoint of step {step}; it has {steps}")
        candidates = chosen
    damaged = []
    for checkpoint in reversed(candidates):
        problem = checkpoint.problem()
        if problem is None:
            for line in damaged:
                print(f"warning: {line}; using the one before it", file=sys.stderr)
            return load_config(FAMILIES, checkpoint.path / "config.yaml"), checkpoint
        damaged.append(f"checkpoint {checkpoint.path} is damaged ({problem})")
    raise UserError(f"{'; '.join(damaged)}; there is no other")


def load_weights(objective: Objective, checkpoint: Checkpoint) -> torch.device:
    """Put the checkpoint's weights into the objective's networks, on the best device of this machine, in evaluation mode.

    Networks on the meta device get their memory there, and one tensor is read at a time: no second copy is held anywhere.
    """
    device = torch.device("cpu" if on_cpu() else "cuda")
    for name, network in objective.networks.items():
        materialise(network, device)
        fill(network, checkpoint.tensors("networks", name))
        network.eval()
    return device


def run_of(checkpoint: Checkpoint) -> Path:
    """The run folder a checkpoint lies in."""
    return checkpoint.path.resolve().parent.parent


def take_text(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Split `flag VALUE` (or `flag=VALUE`) from the settings. Raises UserError."""
    rest, text, words = [], None, iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        text = value if equals else next(words, "")
        if not text or (not equals and text.startswith("--")):
            raise UserError(f"{flag}: needs a value, as in `{flag} VALUE`")
    return text, rest


def take_run(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """Split the RUN argument, which comes first, from the settings. Raises UserError."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"RUN is missing: a run folder or a checkpoint folder comes first ({usage})")
    return arguments[0], arguments[1:]
