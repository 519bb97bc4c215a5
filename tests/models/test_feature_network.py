"""The random feature network: the same everywhere, and able to tell sets of images apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from genscale.models.feature_network import WIDTH, RandomFeatures
from genscale.objectives.sample_quality import frechet_distance
from genscale.rng import torch_generator


def test_features_do_not_depend_on_the_run_or_the_precision():
    torch.manual_seed(1)
    first = RandomFeatures()
    torch.manual_seed(2)
    second = RandomFeatures()
    assert first.identity() == second.identity() == "cf2cffe1e7fb1006180ea8864ee5f5f55ee505e2681b0762e395b91a907046a0"
    assert not list(first.parameters())
    images = torch.rand(4, 3, 16, 16, generator=torch_generator(0, "images"))
    with torch.autocast("cpu", torch.bfloat16):
        features = second(images)
    assert features.dtype == torch.float32
    assert torch.equal(features, first(images))
    second.projection[0, 0] += 1
    assert second.identity() != first.identity()


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 128, 512])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_grey_as_colour(size, channels):
    images = torch.rand(2, channels, size, size, generator=torch_generator(0, "images"))
    features = RandomFeatures()(images)
    assert features.shape == (2, WIDTH) and features.isfinite().all()
    assert features[0].sub(features[1]).abs().mean() > 0.01
    if channels == 1:
        torch.testing.assert_close(features, RandomFeatures()(images.repeat(1, 3, 1, 1)))


def test_the_distance_grows_with_blur_and_noise():
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    network = RandomFeatures()
    real, others = network(images[:600]), images[600:1200]
    blurred = F.avg_pool2d(others, 3, 1, 1)
    noisy = (others + 0.5 * torch.randn(others.shape, generator=torch_generator(0, "noise"))).clamp(0, 1)
    noise = torch.rand(others.shape, generator=torch_generator(0, "uniform"))
    alike, blurry, rough, wild = (frechet_distance(real, network(fake)) for fake in (others, blurred, noisy, noise))
    assert 3 * alike < blurry < wild and 3 * alike < rough < wild
