"""`model.from` of the families that begin from a trained run of genscale (`capabilities.BeginsFromRun`).

Only the start needs that run: what it was goes into the config, as `model.started`, and its networks, frozen or trained on, go
into the new run's folder.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints
from genscale.errors import UserError
from genscale.evaluation.classifier import labelled
from genscale.families import FAMILIES, family
from genscale.interop.weights import Read
from genscale.objectives.base import Objective
from genscale.objectives.capabilities import BeginsFromRun, GeneratesImages
from genscale.reading import Unreadable, read_yaml
from genscale.settings.config import Config
from genscale.settings.parser import load_config


def begins_from_run(config: Config) -> bool:
    """Whether `model.from` is a run of genscale, opened here."""
    return family(config.model.family).can(BeginsFromRun)


def with_source(config: Config, recorded: Path | None) -> Config:
    """The config with `model.started`.

    Args:
        recorded: a checkpoint that the run goes on from. If it began from the same run, that is not looked at any more.

    Raises:
        UserError: no whole checkpoint is there.
    """
    name = config.model.from_  # type: ignore[attr-defined]
    if name is None:
        return config
    judges = [entry.get("name") for entry in getattr(config.objective, "rewards", [])]
    started = _recorded(recorded, name) or description(name, with_labels="classifier" in judges)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, started=started))  # type: ignore[type-var]


def description(name: str, with_labels: bool = False) -> dict[str, Any]:
    """What a run is: `config`, its sections; `step` of its latest whole checkpoint; `classes`, where it is conditional on some;
    `labels`, the classes of the images that it was trained on, where they are asked for.

    Raises:
        UserError: no whole checkpoint is there; or no labels, or no images any more.
    """
    checkpoint = _checkpoint(name)
    about: dict[str, Any] = {"config": checkpoint.config(), "step": checkpoint.step, "classes": None, "labels": None}
    entry = family(about["config"].get("model", {}).get("family", ""))
    if entry.can(GeneratesImages):
        config = load_config(FAMILIES, checkpoint.path / "config.yaml")
        about["classes"] = entry.restore(config, checkpoint.path.resolve().parents[1]).class_names  # type: ignore[attr-defined]
        if with_labels:
            about["labels"] = _labels(config, name)
    return about


def _labels(config: Config, name: str) -> list[str]:
    try:
        images = labelled(config.data)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"objective.rewards: classifier needs the images of {name}, and their labels: {error}") from None
    try:
        return list(images.classes or [])
    finally:
        images.close()


def give_source(objective: Objective, config: Config) -> None:
    """Let an objective that begins from a run read its networks."""
    if begins_from_run(config):
        objective.source = partial(_network, config.model)  # type: ignore[attr-defined]


def _network(model: Any, name: str) -> Read:
    """The weights of a network of the run: averages where it has kept some, as its samples are made with."""
    checkpoint = _checkpoint(model.from_, model.started["step"])
    return checkpoint.weights(name, averaged=True)


def _recorded(recorded: Path | None, name: str) -> dict[str, Any] | None:
    if recorded is None:
        return None
    try:
        model = read_yaml(recorded / "config.yaml")["model"]
        return model["started"] if model["from"] == name else None
    except (OSError, Unreadable, KeyError, TypeError):
        return None


def _checkpoint(name: str, step: int | None = None) -> Checkpoint:
    """The latest whole checkpoint of a run folder (or that of this step), or the one that is named. Raises UserError."""
    try:
        found = [each for each in find_checkpoints(Path(name).expanduser()) if step in (None, each.step)]
    except UserError as error:
        raise UserError(f"model.from: {error}") from None
    problem = f"it has none of step {step}"
    for checkpoint in reversed(found):
        problem = f"{checkpoint.path.name} is damaged ({checkpoint.problem()})"
        if checkpoint.problem() is None:
            return checkpoint
    raise UserError(f"model.from: {name} holds no whole checkpoint: {problem}; copy it again, or begin from another run")


