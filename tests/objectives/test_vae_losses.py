"""Bounds and weights against torch.distributions and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genscale.errors import UserError
from genscale.families.vae.binarisation import binarised, content_keys
from genscale.families.vae.losses import (
    VAEObjectiveSettings,
    check_objective,
    divergence,
    importance_bound,
    log_weights,
    weighted_divergence,
)

GENERATOR = torch.Generator().manual_seed(0)
KL = torch.tensor([[0.5, 2.0, 0.1], [0.0, 0.3, 3.0]])


def test_divergence_and_weights_are_those_of_normal_distributions():
    mean, log_variance = torch.randn(4, 2, 3, generator=GENERATOR), torch.randn(4, 2, 3, generator=GENERATOR)
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(0, 1)
    torch.testing.assert_close(divergence(mean, log_variance), kl_divergence(posterior, Normal(torch.zeros_like(mean), 1)))
    latents, nats = torch.randn(5, 4, 2, 3, generator=GENERATOR), torch.rand(4, 5, generator=GENERATOR)
    wanted = (prior.log_prob(latents) - posterior.log_prob(latents)).flatten(2).sum(2).T - nats
    found = log_weights(nats, latents.transpose(0, 1), mean, log_variance)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(importance_bound(found), found.exp().mean(1).log())


@pytest.mark.parametrize(("settings", "step", "wanted"), [
    (VAEObjectiveSettings(), 1, [2.6, 3.3]),
    (VAEObjectiveSettings(beta=4), 1, [10.4, 13.2]),
    (VAEObjectiveSettings(beta=4, kl_warmup_steps=8), 2, [2.6, 3.3]),
    (VAEObjectiveSettings(beta=4, kl_warmup_steps=8), 80, [10.4, 13.2]),
    (VAEObjectiveSettings(free_bits=0.4), 1, [0.5 + 2.0 + 0.4, 0.4 + 0.4 + 3.0]),
    (VAEObjectiveSettings(free_bits=0.4, beta=2), 1, [5.8, 7.6]),
    (VAEObjectiveSettings(capacity=6, capacity_steps=10, capacity_weight=100), 5, [40, 30]),
    (VAEObjectiveSettings(capacity=6, capacity_steps=10, capacity_weight=100), 50, [340, 270]),
])
def test_what_the_divergence_costs(settings, step, wanted):
    torch.testing.assert_close(weighted_divergence(KL, settings, step), torch.tensor(wanted, dtype=torch.float32))


def test_free_dimensions_have_no_gradient():
    kl = KL.clone().requires_grad_()
    weighted_divergence(kl, VAEObjectiveSettings(free_bits=0.4), 1).sum().backward()
    assert torch.equal(kl.grad, (KL > 0.4).float())


@pytest.mark.parametrize(("settings", "likelihood", "words"), [
    (VAEObjectiveSettings(capacity=5, beta=2), "bernoulli", ["objective.capacity", "beta 2"]),
    (VAEObjectiveSettings(importance_samples=5, free_bits=1), "bernoulli", ["objective.importance_samples", "free_bits 1"]),
    (VAEObjectiveSettings(importance_samples=5, capacity=1), "bernoulli", ["objective.importance_samples", "capacity 1"]),
    (VAEObjectiveSettings(binarise="fixed"), "logistic", ["objective.binarise", "model.likelihood bernoulli"]),
])
def test_settings_that_do_not_go_together_are_refused(settings, likelihood, words):
    with pytest.raises(UserError) as caught:
        check_objective(settings, likelihood)
    assert all(word in str(caught.value) for word in words)


def test_black_and_white_pixels_have_their_intensity_as_probability():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    keys = torch.randint(-2**62, 2**62, (4000,), generator=GENERATOR)
    drawn = torch.cat([binarised(levels.expand(len(part), -1, -1, -1), part) for part in keys.split(500)])
    assert set(drawn.unique().tolist()) == {0, 255}
    share = (drawn == 255).double().mean(0).flatten()
    wanted = torch.arange(256) / 255
    assert share[0] == 0 and share[255] == 1
    error = (share - wanted)[1:255] / (wanted * (1 - wanted) / 4000).sqrt()[1:255]
    assert error.square().mean().item() == pytest.approx(1, abs=0.4) and error.abs().max() < 5


def test_the_fixed_set_belongs_to_the_images_alone():
    images = torch.randint(256, (50, 1, 8, 8), generator=GENERATOR, dtype=torch.uint8)
    keys = content_keys(images)
    assert torch.equal(content_keys(images.flip(0)).flip(0), keys)
    near = images.clone()
    near[:, 0, 0, 0] ^= 1  # the last bit of one pixel
    swapped = images.clone()
    swapped[:, 0, 0, 0], swapped[:, 0, 0, 1] = images[:, 0, 0, 1], images[:, 0, 0, 0]
    assert len(torch.cat([keys, content_keys(near), content_keys(swapped)]).unique()) == 150
    grey = torch.full((1, 1, 64, 64), 128, dtype=torch.uint8)
    agreement = (binarised(grey, keys[:1]) == binarised(grey, content_keys(near[:1]))).double().mean()
    assert agreement.item() == pytest.approx(0.5, abs=0.05)
