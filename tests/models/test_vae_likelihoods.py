"""The likelihoods of pixels against torch.distributions and scipy, and probabilities that sum to one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import logistic
from torch.distributions import Bernoulli, Normal

from genscale.objectives.likelihoods import LIKELIHOODS

ALL = torch.arange(256, dtype=torch.uint8)
PLACES = [(0.0, -1.0), (0.3, -6.9), (-1.0, -3.0), (1.2, -2.0), (-3.0, 2.0), (0.999, -7.0)]  # location, log scale


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("location", "log_scale"), PLACES)
def test_the_discretised_logistic_sums_to_one_and_is_a_difference_of_distribution_functions(location, log_scale):
    likelihood = LIKELIHOODS["logistic"]
    nats = likelihood.nats(likelihood.observed(ALL), torch.tensor(location), torch.tensor(log_scale)).double()
    assert nats.neg().exp().sum().item() == pytest.approx(1, abs=2e-5)
    centres, scale = np.arange(256) / 127.5 - 1, np.exp(log_scale)
    edges = logistic.cdf((np.concatenate([centres - 1 / 255, [2.0]]) - location) / scale)
    edges[0], edges[-1] = 0, 1
    wanted = np.diff(edges)
    large = wanted > 1e-6  # where a difference of nearly equal numbers still has digits
    np.testing.assert_allclose(nats.neg().exp().numpy()[large], wanted[large], rtol=2e-3)
    assert nats.isfinite().all()


def test_the_gradient_of_the_logistic_is_finite_far_away():
    likelihood = LIKELIHOODS["logistic"]
    location, log_scale = torch.full((256,), 5.0, requires_grad=True), torch.full((256,), -7.0, requires_grad=True)
    likelihood.nats(likelihood.observed(ALL), location, log_scale).sum().backward()
    assert location.grad.isfinite().all() and log_scale.grad.isfinite().all()
    assert (location.grad != 0).nonzero().flatten().tolist() == list(range(255))  # white is certain there


def test_bernoulli_and_gaussian_are_those_of_torch():
    location, log_scale = 3 * torch.randn(256, generator=generator()), torch.randn(256, generator=generator())
    bernoulli, gaussian = LIKELIHOODS["bernoulli"], LIKELIHOODS["gaussian"]
    black_and_white = bernoulli.observed((ALL > 99).to(torch.uint8) * 255)
    torch.testing.assert_close(bernoulli.nats(black_and_white, location, log_scale),
                               -Bernoulli(logits=location).log_prob(black_and_white))
    pixels = gaussian.observed(ALL)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    torch.testing.assert_close(gaussian.nats(pixels, location, log_scale), -Normal(location, log_scale.exp()).log_prob(pixels))
    torch.testing.assert_close(bernoulli.mean(location), Bernoulli(logits=location).mean)
    assert torch.equal(gaussian.mean(gaussian.observed(ALL)).mul(255).round().to(torch.uint8), ALL)


def test_a_density_on_integers_is_shifted_by_the_width_of_a_bin():
    """-log of a density of x / 127.5 - 1, plus the shift, is that of x."""
    gaussian = LIKELIHOODS["gaussian"]
    nats = gaussian.nats(gaussian.observed(ALL), torch.tensor(0.2), torch.tensor(-1.0)) + gaussian.nats_to_integers
    integers = Normal((0.2 + 1) * 127.5, 127.5 * np.exp(-1)).log_prob(ALL.float())
    torch.testing.assert_close(nats, -integers)
