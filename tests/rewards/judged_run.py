"""A run of the toy family whose waves are judged as texts: `python judged_run.py FOLDER REWARDS STEPS [key=value ...]`.

What `mine` says is another number each time it is asked; MINE in the environment makes it fail in some way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import genscale
from genscale.families.entry import Family
from genscale.objectives.base import Batch, Networks, Terms
from genscale.rewards.base import Answer
from genscale.rewards.collection import build_rewards
from genscale.rewards.entries import completed
from genscale.rng import Draws
from genscale.testing import toy


@dataclass
class JudgedSettings(toy.ToySettings):
    family: Literal["judged"] = "judged"
    """What is trained."""


@dataclass(frozen=True)
class JudgedObjectiveSettings:
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """What a wave is worth."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", completed(self.rewards))


class JudgedObjective(toy.ToyObjective):
    """The error of a wave counts by its reward."""

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        waves = networks["net"](batch["wave"])
        texts = [" ".join(f"{value:.2f}" for value in each) for each in waves.tolist()]
        answers = [Answer("a wave", text, {"answer": text}, True, int(sample), 0)
                   for text, sample in zip(texts, draws.samples, strict=True)]
        _, total = self.rewards.score(draws.step, answers)
        return {"error": ((waves - batch["wave"]).square().sum(1) * (1 + total)).sum()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        error = (networks["net"](batch["wave"]) - batch["wave"]).square().sum().double()
        return {"error": error, "waves": error * 0 + len(batch["wave"])}


def build(config: genscale.Config, data: Any) -> JudgedObjective:
    objective = restore(config)
    objective.rewards = build_rewards(config.objective.rewards, "text")
    return objective


def restore(config: genscale.Config, folder: Path | None = None) -> JudgedObjective:
    return JudgedObjective(toy.network_of(config), config.data.noise, config.run.seed)


@dataclass(frozen=True)
class WordySettings:
    """What is wordy."""

    most: int = 5
    """Words."""


class Wordy(genscale.TextReward):
    """0 up to so many words, else -1."""

    settings = WordySettings

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [-float(len(each.text.split()) > self.asked.most) for each in answers]


def mine(answers: list[Answer]) -> list[float]:
    fault = os.environ.get("MINE", "")
    if fault == "nan":
        return [float("nan")] * len(answers)
    if fault == "few":
        return [0.5] * (len(answers) - 1)
    if fault == "error":
        raise KeyError("no such judge")
    if fault in ("slow", "hang"):
        time.sleep(0.3 if fault == "slow" else 1000)
    return [int.from_bytes(os.urandom(2)) / 2**16 for _ in answers]


build_data, validation = toy.build_data, toy.validation
FAMILY = Family(JudgedSettings, toy.ToyDataSettings, module=lambda: sys.modules[__name__],
                objective_settings=JudgedObjectiveSettings)


def config_of(folder: str, rewards: list[dict[str, Any]], steps: int, **settings: Any) -> genscale.Config:
    return genscale.config("judged", {
        "run.dir": folder, "run.name": "judged", "model.width": 8, "train.steps": steps, "train.global_batch_size": 4,
        "train.log_every": 1, "train.checkpoint_every": 2, "train.precision": "fp32", "optimizer.lr": 1e-2,
        "tracking.wandb": "disabled", "objective.rewards": rewards, **settings})


if __name__ == "__main__":
    genscale.register(FAMILY)
    folder, rewards, steps, *others = sys.argv[1:]
    config = config_of(folder, json.loads(rewards), int(steps), **dict(word.split("=", 1) for word in others))
    try:
        genscale.train(config, rewards={"mine": mine})
    except genscale.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
