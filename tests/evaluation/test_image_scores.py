"""Scores of generators of which it is known how good they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genscale.config import Config
from genscale.data.images import ImageData, ImageDataSettings
from genscale.data.order import LaneReader
from genscale.evaluation.image_generation import latents
from genscale.evaluation.image_sampling import spherical
from genscale.evaluation.image_scores import ImageScoring, score_images
from genscale.evaluation.trained_run import TrainedRun
from genscale.rng import torch_generator

SETTINGS = ImageDataSettings(size=8, channels=1, validation_images=150)


def scores_of(images: Iterator[torch.Tensor], tmp_path: Path) -> dict:
    """Scores of a generator that gives these images, whatever the latents."""
    objective = SimpleNamespace(networks={}, latent_shape=(3,), class_names=None, image_shape=(1, 8, 8))
    objective.generate = lambda networks, drawn, labels: torch.stack([next(images) for _ in drawn])
    run = TrainedRun(objective, Config(data=SETTINGS, model=SimpleNamespace(family="dcgan")), tmp_path, torch.device("cpu"))
    return score_images(run, ImageScoring(features="random"))


def as_unit(samples) -> Iterator[torch.Tensor]:
    return (torch.from_numpy(sample["image"]).float() / 255 for sample in samples)


def test_a_generator_of_new_images_of_the_same_kind(tmp_path):
    """The held-out images themselves: as if drawn from the distribution."""
    scores = scores_of(as_unit(ImageData(SETTINGS, 0).validation()), tmp_path)
    assert scores["fd"] < 1e-6 and scores["precision"] == scores["recall"] == scores["coverage"] == 1
    assert scores["diversity"] == pytest.approx(1) and scores["memorisation_rate"] == pytest.approx(0.05, abs=0.02)
    assert scores["anchors"]["real_halves"]["fd"] < scores["anchors"]["noise"]["fd"]


def test_a_generator_that_copies_and_one_that_has_collapsed(tmp_path):
    reader = LaneReader(ImageData(SETTINGS, 0), {})
    copies = scores_of(as_unit(reader.read(number)[0] for number in range(150)), tmp_path)
    assert copies["memorisation_rate"] == 1 and copies["precision"] > 0.9
    one = torch.from_numpy(ImageData(SETTINGS, 0).validation()[0]["image"]).float() / 255
    collapsed = scores_of(iter(one + 1e-3 * torch.rand(150, 1, 8, 8, generator=torch_generator(0, "jitter"))), tmp_path)
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.05 and collapsed["diversity"] < 0.05
    assert collapsed["fd"] > 3 * copies["fd"]


def test_latents_belong_to_the_seed_and_the_number():
    objective = SimpleNamespace(latent_shape=(2, 3))
    drawn = latents(objective, 1, torch.arange(10))
    assert torch.equal(latents(objective, 1, torch.tensor([7, 2])), drawn[[7, 2]])
    assert not torch.equal(latents(objective, 2, torch.arange(10)), drawn)


def test_walks_along_the_sphere():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    angles = np.linspace(0, np.pi / 2, 5)
    expected = torch.tensor(2 * np.stack([np.cos(angles), np.sin(angles)], 1)).float()
    torch.testing.assert_close(spherical(a, b, torch.linspace(0, 1, 5)), expected)
    torch.testing.assert_close(spherical(a, 3 * a, torch.tensor([0.5])), torch.tensor([[4.0, 0.0]]))
    ends = torch.randn(2, 2, 4, 4, generator=torch_generator(0, "ends"))
    walk = spherical(*ends, torch.linspace(0, 1, 3))
    torch.testing.assert_close(walk[[0, 2]], ends)
