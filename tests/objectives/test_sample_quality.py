"""Scores of generated samples against closed forms, scipy, scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from genscale.errors import UserError
from genscale.objectives.sample_quality import (
    FeatureStatistics,
    class_histogram,
    diversity,
    frechet_distance,
    kernel_distance,
    memorisation_rate,
    missing_classes,
    mode_count,
    nearest_distances,
    precision_recall_density_coverage,
    squared_mmd,
)
from genscale.rng import torch_generator

WIDTH = 12


class Flat(nn.Module):
    """Lets torchmetrics take features for images."""

    num_features = WIDTH

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def normal(n: int, name: str, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=torch_generator(0, name), dtype=torch.float64)


def correlated(n: int, name: str) -> Tensor:
    return normal(n, name) @ normal(WIDTH, f"{name} mixing") + normal(1, f"{name} mean")


def exactly(mean: Tensor, covariance: Tensor, name: str) -> Tensor:
    """Samples whose own mean and covariance are the given ones."""
    drawn = normal(100, name, len(mean))
    drawn = drawn - drawn.mean(0)
    white = drawn @ torch.linalg.inv(torch.linalg.cholesky(drawn.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def as_images(features: Tensor) -> Tensor:
    return features.float().view(-1, 3, 2, 2)


def test_frechet_distance_of_gaussians_in_closed_form():
    deviations, others = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.25, 0.5]).double()
    rotation = torch.linalg.qr(normal(3, "rotation", 3)).Q
    real = exactly(torch.zeros(3).double(), rotation @ torch.diag(deviations**2) @ rotation.T, "real")
    fake = exactly(torch.tensor([1.0, -2.0, 0.0]).double(), rotation @ torch.diag(others**2) @ rotation.T, "fake")
    # The covariances commute, so what the square roots make of them is the squared difference of the deviations.
    assert frechet_distance(real, fake) == pytest.approx(5 + (deviations - others).square().sum().item(), rel=1e-9)


def test_frechet_distance_equals_the_matrix_square_root_and_torchmetrics():
    real, fake = correlated(200, "real"), correlated(150, "fake")
    means = real.mean(0) - fake.mean(0)
    covariances = [np.cov(features.numpy(), rowvar=False) for features in (real, fake)]
    expected = means.square().sum().item() + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1])).real
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(as_images(real), real=True)
    metric.update(as_images(fake), real=False)
    assert frechet_distance(real.float(), fake.float()) == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_set_is_at_distance_zero_from_itself_also_where_features_are_dead_or_equal(scale):
    features = normal(50, "real") * scale
    features[:, 3] = 0
    features[:, 5] = features[:, 4]
    assert frechet_distance(features, features) < 1e-6
    assert frechet_distance(features, features[torch.randperm(50, generator=torch_generator(0, "order"))]) < 1e-6


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    features = correlated(90, "real")
    merged = FeatureStatistics.of(features[:17]).merge(FeatureStatistics.of(features[17:40])).merge(
        FeatureStatistics.of(features[40:].float()))
    assert merged.count == 90
    torch.testing.assert_close(merged.mean, features.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.covariance, features.T.cov(), rtol=1e-6, atol=1e-6)
    assert frechet_distance(merged, features) < 1e-6


def test_too_few_samples_for_the_width_name_the_number_needed():
    with pytest.raises(UserError, match="12 generated samples are too few for features of width 12.*at least 13"):
        frechet_distance(normal(13, "real"), normal(12, "fake"))
    assert frechet_distance(normal(13, "real"), normal(13, "fake")) > 0
    with pytest.raises(UserError, match="at least 4"):
        kernel_distance(normal(3, "real"), normal(30, "fake"))
    with pytest.raises(UserError, match="5 real samples are too few for k = 5; give at least 6"):
        precision_recall_density_coverage(normal(5, "real"), normal(30, "fake"))


def test_squared_mmd_equals_torchmetrics_and_is_unbiased():
    real, fake = correlated(60, "real"), correlated(60, "fake")
    metric = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=60, normalize=True)
    metric.update(as_images(real), real=True)
    metric.update(as_images(fake), real=False)
    assert squared_mmd(real.float(), fake.float()) == pytest.approx(metric.compute()[0].item(), rel=1e-4)
    estimates = torch.tensor([squared_mmd(normal(20, f"a{i}", 3), normal(20, f"b{i}", 3)) for i in range(300)])
    assert abs(estimates.mean()) < 3 * estimates.std() / math.sqrt(300)


def test_kernel_distance_and_its_standard_error():
    """Against what independent sets of the same size give: their mean, and their spread."""
    pairs = [kernel_distance(normal(100, f"a{i}", 3), normal(100, f"b{i}", 3) + 0.7, subset_size=50) for i in range(60)]
    estimates, errors = torch.tensor(pairs).T
    expected = squared_mmd(normal(4000, "many", 3), normal(4000, "others", 3) + 0.7)
    assert estimates.mean() == pytest.approx(expected, rel=0.1)
    assert errors.mean() == pytest.approx(estimates.std().item(), rel=0.3)
    assert kernel_distance(normal(30, "a"), normal(30, "b")) == kernel_distance(normal(30, "a"), normal(30, "b"))


def test_precision_recall_density_coverage_against_the_definitions():
    real, k = correlated(80, "real"), 5
    fake = (0.6 * normal(60, "fake")) @ normal(WIDTH, "real mixing") + normal(1, "real mean")
    radii = {name: NearestNeighbors(n_neighbors=k + 1).fit(a.numpy()).kneighbors(a.numpy())[0][:, -1]
             for name, a in (("real", real), ("fake", fake))}
    far = np.linalg.norm(real.numpy()[:, None] - fake.numpy()[None], axis=-1)
    in_real, in_fake = far <= radii["real"][:, None], far <= radii["fake"][None]
    scores = precision_recall_density_coverage(real, fake, k)
    assert scores == pytest.approx({"precision": in_real.any(0).mean(), "recall": in_fake.any(1).mean(),
                                    "density": in_real.sum(0).mean() / k, "coverage": in_real.any(1).mean()})
    assert 0 < scores["recall"] < 1 and 0 < scores["coverage"] < 1


def test_one_repeated_sample_is_precise_and_covers_nothing():
    real = normal(600, "real", 3)
    scores = precision_recall_density_coverage(real, torch.zeros(50, 3))
    assert scores["precision"] == 1 and scores["recall"] == 0 and scores["coverage"] < 0.1
    assert diversity(real, torch.zeros(50, 3)) == 0
    assert diversity(real, normal(700, "fake", 3)) == pytest.approx(1, rel=0.05)
    assert diversity(real, normal(700, "fake", 3) / 4) == pytest.approx(0.25, rel=0.05)


def test_memorisation_rate_tells_copies_from_new_samples():
    training, held_out = normal(1500, "training", 3), normal(1000, "held out", 3)
    new = normal(1000, "new", 3)
    assert memorisation_rate(training, held_out, new, quantile=0.1) == pytest.approx(0.1, abs=0.04)
    copies = training[:1000] + 1e-4 * normal(1000, "jitter", 3)
    assert memorisation_rate(training, held_out, copies) == 1
    assert memorisation_rate(training, held_out, torch.cat([copies[:300], new[:700] + 50])) == pytest.approx(0.3)
    nearest = NearestNeighbors(n_neighbors=1).fit(training.numpy()).kneighbors(new.numpy())[0][:, 0]
    np.testing.assert_allclose(nearest_distances(new, training).numpy(), nearest, rtol=1e-9)


def test_classes_counted():
    labels = torch.tensor([0, 0, 3, 1, 3, 3])
    assert class_histogram(labels, 5) == [2, 1, 0, 3, 0]
    assert missing_classes([2, 1, 0, 3, 0], ["a", "b", "c", "d", "e"]) == ["c", "e"]
    assert mode_count(labels, 5) == 3
