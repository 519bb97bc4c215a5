"""What a run says of its end, for the script of its job: no exit code comes through a launcher."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(("settings", "reason"), [
    (("--train.stepz", 5), "--train.stepz: unknown setting"),
    (("--train.global_batch_size", 4, "--train.micro_batch_size", 3), "train.micro_batch_size: 3 x 1 processes does not"),
    (("--data.source", "nowhere.txt"), "data.source=nowhere.txt: there is no such file"),
])  # fmt: skip
def test_a_mistake_is_told_wherever_it_is_found(settings, reason, genscale, tiny_config, tiny_run, monkeypatch):
    monkeypatch.setenv("GENSCALE_RUN", str(tiny_run))
    tiny_run.mkdir(parents=True)  # by the job
    assert genscale("train", "--config", tiny_config, *settings).message().startswith(reason)
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"]) == ("failed", 2) and ended["reason"].startswith(reason)


def test_what_another_process_has_said_stands(genscale, tiny_config, run, say_ended, monkeypatch):
    monkeypatch.setenv("GENSCALE_RUN", str(run))
    run.mkdir(parents=True)
    say_ended("stopped", 138, 4)
    assert genscale("train", "--config", tiny_config, "--train.stepz", 5).code == 2
    assert json.loads((run / "ended.json").read_text())["how"] == "stopped"


def test_without_a_job_no_folder_is_made_for_a_mistake(genscale, tiny_config, tiny_run):
    assert genscale("train", "--config", tiny_config, "--train.stepz", 5).code == 2
    assert not tiny_run.exists()
