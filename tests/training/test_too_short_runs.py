"""What a run is too short for, and validation sets that nothing can be measured on, are said before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from genscale.families.vae.losses import VAEObjectiveSettings
from genscale.settings.config import Config, ScheduleSettings, TrainSettings
from genscale.training.schedules import never_reached


@pytest.mark.parametrize(("train", "schedule", "words"), [
    ({"steps": 10}, {"warmup_steps": 20}, ["schedule.warmup_steps: 20", "train.steps 10", "at 50% of its peak", "at most 9"]),
    ({"steps": 10}, {"warmup_steps": 10}, ["at 100% of its peak and never falls"]),
    ({"steps": 10}, {"warmup_steps": 20, "name": "constant"}, ["at 50% of its peak; at most 9"]),
    ({"steps": 10}, {"warmup_steps": 9, "name": "wsd"}, ["schedule.decay_share: 0.2", "at most 0.1"]),
    ({"steps": 10, "ema_half_life": 1000, "ema_ramp_up": 0}, {}, ["train.ema_half_life: 1000", "320 of the whole run"]),
])  # fmt: skip
def test_a_setting_that_takes_longer_than_the_run(train: dict, schedule: dict, words: list[str]) -> None:
    (line,) = never_reached(Config(train=TrainSettings(**train), schedule=ScheduleSettings(**schedule)))
    assert all(word in line for word in words), line


def test_a_setting_that_does_not() -> None:
    for schedule in ({"warmup_steps": 9}, {"warmup_steps": 8, "name": "wsd"}, {"warmup_steps": 10, "name": "constant"}, {}):
        config = Config(train=TrainSettings(steps=10, ema_half_life=1000), schedule=ScheduleSettings(**schedule),
                        objective=VAEObjectiveSettings(kl_warmup_steps=10))
        assert list(never_reached(config)) == []
    config = replace(config, objective=VAEObjectiveSettings(kl_warmup_steps=11))
    assert [line.split(":")[0] for line in never_reached(config)] == ["objective.kl_warmup_steps"]


def test_it_is_a_line_of_the_run(genscale, tiny_config) -> None:
    done = genscale("train", "--config", tiny_config, "--schedule.warmup_steps", 100, "--train.checkpoint_every", 0)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if line.startswith("warning: schedule.")] == [
        "warning: schedule.warmup_steps: 100 is the whole of train.steps 6: the learning rate ends at 6% of its peak and never "
        "falls; at most 5 leaves a step after it"]


def test_a_validation_set_of_one_character(refuse, genscale, trained, tmp_path: Path) -> None:
    file = tmp_path / "onechar.txt"
    file.write_text("x")
    said = refuse("--data.validation_source", file, "--train.evaluate_every", 2)
    assert said.startswith(f"data.validation_source={file}: ") and "where its text ends" in said
    assert "where its text ends" in genscale("evaluate", trained, "--data.validation_source", file).message()
    file.write_text("xy")
    assert genscale("evaluate", trained, "--data.validation_source", file).code == 0
