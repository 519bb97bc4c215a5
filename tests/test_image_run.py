"""A run that makes pictures, from its first step to what is said at its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.evaluation.validation import evaluating
from genscale.families import FAMILIES, family
from genscale.settings.parser import load_config
from genscale.testing.runs import Run
from genscale.verbs.trained import load_weights

SETTINGS: dict[str, Any] = {
    "run": {"name": "tiny"}, "model": {"family": "dcgan", "width": 4, "latent": 4},
    "data": {"source": "digits", "size": 16, "channels": 1, "validation_images": 80},
    "objective": {"discriminator_steps": 2},
    "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1,
              "evaluate_every": 2, "checkpoint_every": 2, "ema_half_life": 40, "ema_ramp_up": 0},
    "tracking": {"wandb": "disabled", "tensorboard": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(genscale, tmp_path_factory) -> tuple[Path, Any]:
    """The folder of the run, and what the command said."""
    folder = tmp_path_factory.mktemp("image-run")
    settings = {**SETTINGS, "run": {"name": "tiny", "dir": str(folder)}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    done = genscale("train", "--config", folder / "tiny.yaml")
    assert done.code == 0, done.err
    return folder / "tiny", done


def test_the_sample_is_a_picture_of_the_averaged_weights(finished) -> None:
    run, _ = finished
    checkpoint = Checkpoint(run / "checkpoints" / "step-00000004")
    objective = family("dcgan").restore(load_config(FAMILIES, run / "config.yaml"), run)
    pictures = []
    for averaged in (True, False):
        device = load_weights(objective, checkpoint, averaged)
        with evaluating(objective.networks):
            pictures.append(objective.preview(objective.networks, 1337, device))
    saved = np.asarray(Image.open(run / "samples" / "step-00000004.png"))
    assert np.array_equal(saved, pictures[0]) and not np.array_equal(saved, pictures[1])
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000004.png"]


def test_validation_scores_the_averaged_weights(finished, genscale) -> None:
    run, _ = finished
    validation = {line["step"]: line for line in Run(run).metrics() if "validation_loss" in line}
    assert list(validation) == [2, 4] and validation[4]["validation_fd"] == validation[4]["validation_loss"]
    checkpoint = Checkpoint(run / "checkpoints" / "step-00000004")
    average, weights = (checkpoint.weights("generator", averaged) for averaged in (True, False))
    assert any(not torch.equal(average(key), weights(key)) for key in average.keys())  # noqa: SIM118 - no dict
    assert not (checkpoint.path / "averages" / "discriminator.safetensors").exists()
    # Another average is another checkpoint, though all else is the same.
    other = run.parent / "other" / "step-00000004"
    shutil.copytree(checkpoint.path, other)
    shutil.copy(other / "networks" / "generator.safetensors", other / "averages" / "generator.safetensors")
    assert Checkpoint(other).digest() != checkpoint.digest()


def test_what_is_said_fits_pictures_and_several_phases(finished) -> None:
    run, done = finished
    assert f"\nsample: {run}/samples/step-00000004.png\n" in done.out and "  |" not in done.out
    assert f"genscale sample {run} --count 64 --out grid.png\n" in done.out
    logged = [line for line in Run(run).metrics() if "generator/loss" in line]
    assert [line["images"] for line in logged] == [16, 32, 48, 64], "two batches of 8 a step, one for each discriminator step"
    assert all(line["images_per_second"] * line["step_seconds"] == pytest.approx(16) for line in logged)
    *_, last = [line for line in done.err.splitlines() if line.startswith("step 4/4")]
    for words in ("discriminator ", "generator ", "fd ", "images/s"):
        assert words in last


def test_statistics_of_a_micro_batch_keep_their_number_at_a_resume(finished, genscale, tmp_path) -> None:
    run, _ = finished
    shutil.copytree(run, tmp_path / "tiny")
    command = ["train", "--config", run.parent / "tiny.yaml", "--run.dir", tmp_path, "--train.steps", 5]
    message = genscale(*command, "--train.micro_batch_size", 8).message()
    assert message.startswith("train.micro_batch_size: 8 on 1 process makes 1 micro-batch of a step, and the checkpoint "
                              f"{tmp_path / 'tiny' / 'checkpoints' / 'step-00000004'} was trained with 2: ")
    assert message.endswith("set train.micro_batch_size to 4")
    assert genscale(*command).code == 0
