"""The collapse watch: when it speaks, what a restored run holds, and that a resume is bit for bit, after a restore too."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.hook import StepReport
from genscale.settings.config import TrainSettings
from genscale.testing.runs import Run
from genscale.training.collapse import CollapseWatch
from genscale.training.measuring import Count

STEPS = 16
# By this factor every evaluation but the first is bad: the third is the second in a row.
RUN = {"steps": STEPS, "global_batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 2,
       "checkpoint_keep": 100, "evaluate_every": 4, "collapse_factor": 0.5, "ema_half_life": 8, "ema_ramp_up": 0}


def verdicts(losses: list[float], **settings: Any) -> list[bool]:
    watch = CollapseWatch(TrainSettings(**{"collapse": "stop", **settings}), None)
    return [watch.collapsed(loss) for loss in losses]


def test_only_so_many_bad_evaluations_in_a_row_are_a_collapse() -> None:
    assert verdicts([10, 31, 29, 31, 31]) == [False, False, False, False, True]
    assert verdicts([10, 31, 31, 31], collapse_patience=3) == [False, False, False, True]
    assert verdicts([10, 20, 21], collapse_factor=2.0, collapse_patience=1) == [False, False, True]
    assert verdicts([40, 10, 31, 31]) == [False, False, False, True], "the best counts, not the first"
    assert verdicts([math.nan, math.nan, 10, math.nan, math.inf]) == [False, False, False, False, True]
    assert verdicts([-10, 40, 40, 40]) == [False] * 4, "a factor of what is not above 0 means nothing"
    assert verdicts([10, 31, 31], collapse="ignore") == [False] * 3


def test_the_count_goes_on_from_a_saved_state() -> None:
    losses = [10, 31, 29, 31, 31, 31, 31, 9, 28, 28]
    settings = TrainSettings(collapse="restore")
    straight = CollapseWatch(settings, None)
    expected = [straight.collapsed(loss) for loss in losses]
    for cut in range(len(losses)):
        first = CollapseWatch(settings, None)
        found = [first.collapsed(loss) for loss in losses[:cut]]
        second = CollapseWatch(settings, json.loads(json.dumps(first.state())))
        found += [second.collapsed(loss) for loss in losses[cut:]]
        assert found == expected and second.state() == straight.state()


@pytest.fixture(scope="module")
def config(tiny_settings, tmp_path_factory) -> Callable[..., Path]:
    """A YAML file of the tiny run under watch."""

    def write(**train: Any) -> Path:
        folder = tmp_path_factory.mktemp("collapse")
        settings = {**tiny_settings, "run": {"name": "tiny", "dir": str(folder)}, "train": {**RUN, **train}}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return folder / "run.yaml"

    return write


def lines(run: Path) -> list[dict[str, Any]]:
    times = ("seconds", "per_second", "data_wait_share")
    return [{key: value for key, value in line.items() if not key.endswith(times)} for line in Run(run).metrics()]


def checkpoint(run: Path, step: int) -> Checkpoint:
    return Checkpoint(run / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def restored(genscale, config) -> Path:
    """The folder of a run that collapsed at step 12 and went back to step 8."""
    file = config(collapse="restore")
    done = genscale("train", "--config", file)
    assert done.code == 0, done.err
    assert f"going back to the weights of {checkpoint(file.parent / 'tiny', 8).path}" in done.err
    return file.parent / "tiny"


def test_a_collapsed_run_goes_back_to_the_average_and_the_optimizer_of_its_best_checkpoint(restored) -> None:
    evaluations = {line["step"]: line for line in lines(restored) if "validation_loss" in line}
    assert [step for step, line in evaluations.items() if "collapses" in line] == [12]
    best, after = checkpoint(restored, 8), checkpoint(restored, 12)
    for kind, source in (("networks", "averages"), ("averages", "averages"), ("optimizers", "optimizers")):
        found, wanted = after.tensors(kind, "gpt"), best.tensors(source, "gpt")
        assert sorted(found.keys()) == sorted(wanted.keys())
        for key in found.keys():  # noqa: SIM118 - no dict
            assert torch.equal(found(key), wanted(key))
    weights, average = best.weights("gpt", averaged=False), best.weights("gpt", averaged=True)
    assert not torch.equal(weights("token_embedding.weight"), average("token_embedding.weight"))
    state = after.state()
    assert state["best"]["step"] == 8 and state["evaluation"] == best.state()["evaluation"]
    assert state["collapse"] == {"bad": 0, "collapses": 1, "best": evaluations[12]["validation_loss"]}
    assert state["data"]["batches"] == 12, "the data goes on"


@pytest.mark.parametrize("step", [10, 12])
def test_a_run_resumed_around_a_restore_is_the_run_that_was_never_stopped(step, restored, genscale, tmp_path) -> None:
    """From before it, with one bad evaluation counted, and from right after it."""
    run = tmp_path / "tiny"
    shutil.copytree(restored, run)
    for later in range(step + 2, STEPS + 1, 2):
        shutil.rmtree(checkpoint(run, later).path)
    done = genscale("train", "--config", run / "config.yaml", "--run.dir", tmp_path)
    assert done.code == 0, done.err
    assert f"continuing from {checkpoint(run, step).path}" in done.err
    assert checkpoint(run, STEPS).digest() == checkpoint(restored, STEPS).digest()
    assert lines(run) == lines(restored)


@pytest.mark.parametrize("step", [8, 12])
def test_a_run_stopped_where_an_evaluation_is_due_makes_it_at_a_resume(step, restored, genscale, config, monkeypatch) -> None:
    """Of the best checkpoint, and of the evaluation that takes the run back to it."""
    file = config(collapse="restore")
    count = Count.step

    def count_and_stop(hook: Count, report: StepReport) -> None:
        count(hook, report)
        if report.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Count, "step", count_and_stop)
        assert genscale("train", "--config", file).code == 143
    run = file.parent / "tiny"
    assert checkpoint(run, step).state()["collapse"]["bad"] == (0 if step == 8 else 1)
    done = genscale("train", "--config", file)
    assert done.code == 0 and f"going back to the weights of {checkpoint(run, 8).path}" in done.err, done.err
    assert checkpoint(run, STEPS).digest() == checkpoint(restored, STEPS).digest()
    assert lines(run) == lines(restored)


def test_a_collapsed_run_can_be_ended_instead(genscale, config) -> None:
    file = config(collapse="stop")
    run = file.parent / "tiny"
    message = genscale("train", "--config", file).message_of_run()
    for words in ("train.collapse: ", "at step 12", "train.collapse_factor 0.5", str(checkpoint(run, 8).path), "optimizer.lr"):
        assert words in message
    assert lines(run)[-1]["step"] == 12 and checkpoint(run, 12).problem() is None
    again = genscale("train", "--config", file, "--train.collapse", "restore")  # it may go on, and then restores
    assert again.code == 0 and "going back to the weights of" in again.err, again.err


def test_what_the_watch_cannot_do_without_is_named(refuse) -> None:
    assert refuse("--train.collapse", "stop").startswith("train.collapse: stop goes by the evaluations, and "
                                                         "train.evaluate_every is 0")
    assert "train.checkpoint_every: 4 does not divide train.evaluate_every 6" in \
        (message := refuse("--train.collapse", "restore", "--train.evaluate_every", 6, "--train.checkpoint_every", 4))
    assert message.endswith("nearest that do: 2 or 3")
    assert refuse("--train.collapse", "restore", "--train.evaluate_every", 6, "--train.checkpoint_every",
                  0).endswith("nearest that do: 3 or 6")
