"""A handful of pictures is enough for a run of every image family: what only watches does not forbid it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genscale.objectives.sample_quality import distance, diversity, squared_discrepancy
from genscale.testing.runs import Run

MODELS = {"dcgan": {"family": "dcgan", "width": 4, "latent": 4}, "vae": {"family": "vae", "width": 4, "latents": 2},
          "vae_gan": {"family": "vae_gan", "width": 4, "latents": 2}}


@pytest.mark.parametrize(("family", "count"), [("dcgan", 40), ("vae_gan", 40), ("vae", 10), ("dcgan", 10), ("vae_gan", 10)])
def test_a_run_on_a_few_pictures(family, count, genscale, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    settings = {"run": {"name": "few", "dir": str(tmp_path)}, "model": MODELS[family], "tracking": {"wandb": "disabled"},
                "data": {"source": str(tmp_path / "images"), "size": 8, "channels": 1},
                "train": {"steps": 2, "global_batch_size": 8, "evaluate_every": 2, "precision": "fp32"}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(settings))
    done = genscale("train", "--config", tmp_path / "few.yaml")
    assert done.code == 0, done.err
    found = next(line for line in Run(tmp_path / "few").metrics() if "validation_loss" in line)
    assert np.isfinite(found["validation_loss"])
    if family != "vae":
        assert "validation_fd" not in found and found["validation_mmd"] == found["validation_loss"]
        assert "too few for a Frechet distance of 64 features, which takes 65: evaluations give" in done.err


def test_the_discrepancy_of_a_few_samples_is_the_closed_form() -> None:
    real, fake = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    kernel = lambda a, b: (np.dot(a, b) / 2 + 1) ** 3  # noqa: E731
    expected = kernel([1, 0], [1, 0]) + kernel([0, 2], [0, 2]) - 2 * kernel([1, 0], [0, 2])
    assert squared_discrepancy(real, fake) == pytest.approx(expected)
    assert squared_discrepancy(real, real) == 0
    assert distance(real, fake) == {"loss": pytest.approx(expected), "mmd": pytest.approx(expected)}
    assert distance(real, torch.full((1, 2), float("nan")))["loss"] == float("inf")
    assert set(distance(torch.randn(3, 2), torch.randn(3, 2))) == {"loss", "fd"}


def test_diversity_is_left_out_where_it_says_nothing() -> None:
    assert diversity(torch.ones(1, 2), torch.randn(1, 2)) is None
    assert diversity(torch.ones(5, 2), torch.randn(5, 2)) is None
    assert diversity(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0]])) == pytest.approx(3)
