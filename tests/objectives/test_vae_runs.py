"""The shipped configs of the families vae and vae_gan as runs: a few steps, then the run is read back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genscale.checkpoint.checkpoints import find_checkpoints
from genscale.evaluation.validation import validate
from genscale.families import FAMILIES
from genscale.settings.parser import load_config
from genscale.testing.runs import Run
from genscale.verbs.trained import load_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vae", "vae_gan"])
def test_a_run_is_read_back_as_it_was_validated(family, genscale, tmp_path):
    small = ["--model.width", 4, "--train.steps", 2, "--train.global_batch_size", 8, "--data.validation_images", 80,
             "--tracking.wandb", "disabled", "--train.precision", "fp32"]
    done = genscale("train", "--config", ROOT / "configs" / family / "digits.yaml", "--run.dir", tmp_path, *small)
    assert done.code == 0, done.err
    (folder,) = tmp_path.iterdir()
    logged = [line for line in Run(folder).metrics() if "validation_loss" in line][-1]
    config = load_config(FAMILIES, folder / "config.yaml")
    objective = FAMILIES[family].restore(config, folder)
    device = load_weights(objective, list(find_checkpoints(folder))[-1])
    samples = FAMILIES[family].validation(config.data, config.run.seed)
    found = validate(objective, objective.networks, samples, batch_size=16, rank=0, world_size=1, device=device,
                     reduce_sum=lambda tensor: tensor, autocast=contextlib.nullcontext)
    assert {f"validation_{name}": value for name, value in found.items()} == \
        pytest.approx({key: logged[key] for key in logged if key.startswith("validation_")}, rel=1e-4)
    (file,) = (folder / "samples").glob("*.png")
    picture = np.asarray(Image.open(file))
    without_inputs = objective.preview(objective.networks, config.run.seed, device)
    assert picture.shape[2] == 3 and np.abs(picture[-60:].astype(int) - without_inputs[-60:]).max() <= 1
