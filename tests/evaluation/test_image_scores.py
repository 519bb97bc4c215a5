"""Scores of generators of which it is known how good they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.grouped import PackedImageDataSettings, gan_images
from genscale.data.order import LaneReader
from genscale.errors import UserError
from genscale.evaluation.image_generation import latents
from genscale.evaluation.image_sampling import spherical
from genscale.evaluation.image_scores import ImageScoring, score_images
from genscale.evaluation.trained_run import TrainedRun
from genscale.rng import torch_generator
from genscale.settings.config import Config

SETTINGS = ImageDataSettings(size=8, channels=1, validation_images=150)


def scores_of(images: Iterator[torch.Tensor], tmp_path: Path, data: ImageDataSettings = SETTINGS,
              features: str | None = "random", shape: tuple[int, int, int] = (1, 8, 8),
              class_names: list[str] | None = None) -> dict:
    """Scores of a generator that gives these images, whatever the latents."""
    objective = SimpleNamespace(networks={}, latent_shape=(3,), class_names=class_names, image_shape=shape)
    objective.generate = lambda networks, drawn, labels: torch.stack([next(images) for _ in drawn])
    run = TrainedRun(objective, Config(data=data, model=SimpleNamespace(family="dcgan")), tmp_path, torch.device("cpu"))
    return score_images(run, ImageScoring(features=features))


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


def test_images_without_labels_have_random_features_by_default(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", images=images)
    settings = ImageDataSettings(str(tmp_path / "plain.npz"), size=8, channels=1, validation_fraction=0.4)
    fakes = torch.rand(300, 1, 8, 8, generator=torch_generator(0, "fakes"))
    scores = scores_of(iter(fakes), tmp_path, settings, features=None)
    assert scores["protocol"]["features"] == "random" and "class_histogram" not in scores
    with pytest.raises(UserError, match="label"):
        scores_of(iter(fakes), tmp_path, settings, features="classifier")


def test_stacked_images_are_compared_with_stacked_ones(tmp_path):
    settings = PackedImageDataSettings(size=8, channels=1, stack=3, pack=2, validation_images=150)
    copies = gan_images(ImageData(settings, 0), settings).validation()
    scores = scores_of(as_unit(copies), tmp_path, settings, features=None, shape=(3, 8, 8))
    assert scores["protocol"]["features"] == "random" and scores["protocol"]["channels"] == 3
    assert scores["fd"] < 1e-6 and scores["coverage"] == 1
    with pytest.raises(UserError, match="--features: a classifier finds one class"):
        scores_of(as_unit(copies), tmp_path, settings, features="classifier", shape=(3, 8, 8))


@pytest.mark.parametrize("changed", [{"labels": False}, {"labels": True}])
def test_a_conditional_run_is_judged_by_images_of_its_own_classes(tmp_path, changed):
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.arange(300) % 2)
    settings = ImageDataSettings(str(tmp_path / "two.npz"), size=8, channels=1, **changed)
    with pytest.raises(UserError, match="two.npz has the classes 0, 1, and the run was trained on one, two"):
        scores_of(iter(()), tmp_path, settings, class_names=["one", "two"])


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
