"""`model.from` of the families that begin from a trained run of genscale (`capabilities.BeginsFromRun`).

Only the start needs that run: what it was goes into the config, as `model.started`, and its networks, frozen or trained on, go
into the new run's folder.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.errors import UserError
from genscale.evaluation.trained_run import TrainedRun
from genscale.families import FAMILIES, family
from genscale.interop.own_runs import recorded_model, whole_checkpoint
from genscale.interop.weights import Read
from genscale.objectives.base import Objective
from genscale.objectives.capabilities import BeginsFromRun, GeneratesImages
from genscale.settings.config import Config
from genscale.settings.parser import load_config


def begins_from_run(config: Config) -> bool:
    """Whether `model.from` is a run of genscale, opened here."""
    return family(config.model.family).can(BeginsFromRun)


def with_source(config: Config, recorded: Path | None) -> Config:
    """The config with `model.started`, what the run is that it begins from: `config`, its sections; `step`, that of its latest
    whole checkpoint; `classes` that it is conditional on; `judges`, by the run of each classifier that `objective.rewards`
    names, the classes of its images; and `flow`, which kind of layers the policy begins with.

    Args:
        recorded: a checkpoint that the run goes on from. If it began from the same run, that is not looked at any more.

    Raises:
        UserError: no whole checkpoint is there; or no images with labels for a classifier.
    """
    name = config.model.from_
    if name is None:
        return config
    started = _recorded(recorded, name)
    if started is None:
        checkpoint = whole_checkpoint(name, read=True)
        started = {"config": checkpoint.config(), "step": checkpoint.step, "classes": _classes(checkpoint),
                   "judges": _judges(config), "flow": "directions"}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, started=started))


def _classes(checkpoint: Checkpoint) -> list[str] | None:
    entry = family(checkpoint.config().get("model", {}).get("family", ""))
    return cast(GeneratesImages, _opened(checkpoint).objective).class_names if entry.can(GeneratesImages) else None


def _judges(config: Config) -> dict[str, list[str]]:
    from genscale.evaluation.image_scores import labels_of  # a run of texts loads no images

    rewards: list[dict[str, Any]] = getattr(config.objective, "rewards", [])
    found: dict[str, list[str]] = {}
    for number, entry in enumerate(rewards):
        if entry["name"] == "classifier" and entry["run"] not in found:
            key = f"objective.rewards[{number}].run"
            run = _opened(whole_checkpoint(entry["run"], read=True, key=key))
            try:
                found[entry["run"]] = labels_of(run)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
    return found


def _opened(checkpoint: Checkpoint) -> TrainedRun:
    """A run without its weights."""
    config, folder = load_config(FAMILIES, checkpoint.path / "config.yaml"), checkpoint.path.resolve().parents[1]
    return TrainedRun(family(config.model.family).restore(config, folder), config, folder, torch.device("cpu"))


def give_source(objective: Objective, config: Config) -> None:
    """Let an objective that begins from a run read its networks."""
    if begins_from_run(config):
        objective.source = partial(_network, config.model)  # type: ignore[attr-defined]


def _network(model: Any, name: str) -> Read:
    """The weights of a network of the run: averages where it has kept some, as its samples are made with."""
    return whole_checkpoint(model.from_, model.started["step"]).weights(name, averaged=True)


def _recorded(recorded: Path | None, name: str) -> dict[str, Any] | None:
    model = recorded_model(recorded) if recorded is not None else {}
    return model.get("started") if model.get("from") == name else None
