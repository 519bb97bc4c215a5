"""genscale as a library: what `import genscale` offers, which is what the command line does, with the same checks and messages.

Nothing here is more than a few lines into one room; torch is loaded where it is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genscale.errors import UserError, nearest
from genscale.families import FAMILIES
from genscale.rewards.registry import REWARDS
from genscale.settings.config import PLAN, Config
from genscale.settings.parser import parse_config

if TYPE_CHECKING:
    from genscale.evaluation.trained_run import TrainedRun
    from genscale.hook import Hook
    from genscale.rewards.registry import Given
    from genscale.training.run import RunResult


def config(name: str | Path, settings: Mapping[str, Any] | None = None) -> Config:
    """Make the config of a run, as `genscale train` does from its flags.

    >>> import genscale
    >>> config = genscale.config("vae", {"train.steps": 300, "data.source": "digits", "data.size": 16, "data.channels": 1})
    >>> config.train.steps, config.model.family
    (300, 'vae')

    Args:
        name: a family, whose defaults it then has ("gpt"); a config that comes with genscale ("vae/digits"); or a YAML file.
        settings: what is to be otherwise, by dotted key as on the command line: `{"train.steps": 300}`.

    Raises:
        UserError: a mistake in the settings, in one line with the nearest that is allowed.
    """
    word = os.fspath(name)
    if word in FAMILIES:
        start = [f"--model.family={word}"]
    elif os.path.exists(word) or {"/", "."} & set(word):
        start = [f"--config={word}"]
    else:
        raise UserError(f"genscale.config: '{word}' is no family, no config that comes with genscale, and no file"
                        f"{nearest(word, FAMILIES)}; families: {', '.join(FAMILIES)}")
    return parse_config(FAMILIES, [*start, *_flags(settings or {})], prog="genscale")


def read_config(path: str | Path, settings: Mapping[str, Any] | None = None) -> Config:
    """`Config.from_yaml`. Raises UserError."""
    return parse_config(FAMILIES, [f"--config={os.fspath(path)}", *_flags(settings or {})], prog="genscale")


def train(config: Config, hooks: Sequence[Hook] = (), rewards: Mapping[str, Given] | None = None) -> RunResult:
    """Train as the config says, like `genscale train`: from the run folder's latest checkpoint, if there is one.

    In a script that `accelerate launch`, torchrun or srun starts in several processes it is one run of all of them, under the
    strategy that the config or the launcher asks for. In the main thread Ctrl-C (a notebook's interrupt), SIGTERM and SIGUSR1
    end the run after the step, with a checkpoint, and `stopped_by` of the result says so. Environment, logging, the
    process group and torch's global settings are afterwards as they were.

    Args:
        config: from `genscale.config` or `genscale.Config.from_yaml`; it is not changed.
        hooks: what else to do every so many steps: `genscale.every(50, f)`, or a `genscale.Hook`.
        rewards: by the name that `objective.rewards` calls it, a function that judges: of a list of `genscale.Answer`, it gives
            a number each; of images `(batch, channels, height, width)` in [0, 1], a tensor `(batch,)`. Or a class that inherits
            from `genscale.TextReward` or `genscale.ImageReward`. What a function says is kept in the run folder, so that a run
            that goes on need not ask again; a class may say that it is `repeatable`.

    Raises:
        UserError: a mistake in the settings, before the first step, or a run that has gone wrong.
    """
    from genscale.cluster.promised_devices import check_devices
    from genscale.cluster.slurm_task import adopt_slurm_task
    from genscale.parallel.launcher import follow_launcher
    from genscale.supervise.ending import before_the_run
    from genscale.training.process_state import process_left_as_found
    from genscale.training.run import train as run

    with process_left_as_found():
        adopt_slurm_task()
        follow_launcher(starting=True)
        with before_the_run():
            check_devices()
        with REWARDS.knowing(rewards or {}):
            if config.train.micro_batch_size == PLAN:
                from genscale.planning.starting import with_planned_size

                with before_the_run():
                    config = with_planned_size(config)
            if rewards and config.objective is not None:  # whose defaults were not known where the config was made
                config = replace(config, objective=replace(config.objective))
            return run(config, hooks=hooks)


def load(path: str | Path, step: int | None = None, *, device: str | None = None, averaged: bool = True) -> TrainedRun:
    """Load a trained run: `genscale.load("runs/demo").networks["gpt"]` is a plain module in evaluation mode.

    Args:
        path: a run folder, a checkpoint of one, or a Hugging Face folder.
        step: of the checkpoint; None: the latest.
        device: as torch names it ("cpu", "cuda:1"); None: the GPU where there is one.
        averaged: networks of which the run has kept an average (`train.ema_half_life`) have that, not the last step's weights.

    Raises:
        UserError: nothing is there, or it is damaged.
    """
    import torch

    from genscale.verbs.trained import find_trained, open_run

    config, checkpoint = find_trained(os.fspath(path), step)
    return open_run(config, checkpoint, live=not averaged, device=torch.device(device) if device else None)


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """As they would be typed."""
    return [f"--{key}={_typed(value)}" for key, value in settings.items()]


def _typed(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    value = value.item() if hasattr(value, "item") else value  # a number of NumPy or torch
    try:
        return json.dumps(value, default=str)  # paths in lists
    except TypeError:
        return str(value)
