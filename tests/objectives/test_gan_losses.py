"""Losses against torch's own and closed forms; penalties against discriminators of known slope."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genscale.errors import UserError
from genscale.objectives.gan_losses import discriminator_loss, generator_loss, gradient_penalty, zero_centred_penalty
from genscale.objectives.gan_settings import GANObjectiveSettings, check_losses

REAL, FAKE = torch.tensor([2.0, -0.5, 0.3]), torch.tensor([-1.0, 0.4, 1.5])


def test_non_saturating_is_cross_entropy_on_logits():
    ones, zeros = torch.ones(3), torch.zeros(3)
    bce = F.binary_cross_entropy_with_logits
    truth = bce(REAL, ones, reduction="sum") + bce(FAKE, zeros, reduction="sum")
    torch.testing.assert_close(discriminator_loss("non_saturating", REAL, FAKE), truth)
    torch.testing.assert_close(generator_loss("non_saturating", FAKE), bce(FAKE, ones, reduction="sum"))


@pytest.mark.parametrize(("name", "of_discriminator", "of_generator"), [
    ("hinge", (0 + 1.5 + 0.7) + (0 + 1.4 + 2.5), 1 - 0.4 - 1.5),
    ("wasserstein", 0.9 - 1.8, -0.9),
    ("least_squares", 0.5 * (1 + 2.25 + 0.49 + 1 + 0.16 + 2.25), 0.5 * (4 + 0.36 + 0.25)),
    ("relativistic", sum(math.log1p(math.exp(x)) for x in (-3.0, 0.9, 1.2)),
     sum(math.log1p(math.exp(x)) for x in (3.0, -0.9, -1.2))),
])
def test_by_hand(name, of_discriminator, of_generator):
    assert discriminator_loss(name, REAL, FAKE).item() == pytest.approx(of_discriminator, rel=1e-5)
    assert generator_loss(name, FAKE, REAL).item() == pytest.approx(of_generator, rel=1e-5)


def test_losses_are_in_fp32_whatever_the_logits_are():
    assert discriminator_loss("hinge", REAL.bfloat16(), FAKE.bfloat16()).dtype == torch.float32
    assert generator_loss("wasserstein", FAKE.bfloat16()).dtype == torch.float32


@pytest.fixture
def linear():
    """Logits 3 x + 4 y + 1, of slope 5 everywhere."""
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, 4.0]]))
        network.bias.fill_(1.0)
    return network


def test_penalties_of_a_known_slope(linear):
    def judge(x):
        return linear(x).squeeze(1)

    points = torch.randn(6, 2)
    penalty = gradient_penalty(judge, points, torch.zeros(6, 2), torch.rand(6))
    assert penalty.item() == pytest.approx(6 * 16, rel=1e-5)
    penalty = zero_centred_penalty(judge, points)
    assert penalty.item() == pytest.approx(6 * 12.5, rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(linear.weight.grad, 6 * linear.weight.detach())  # of 25/2: the weight itself
    assert linear.bias.grad.item() == 0, "a parameter without a gradient would hang DDP"


def test_the_penalty_is_taken_between_fake_and_real():
    """Logits x^2: slope 2 x, so that the penalty says where it was taken."""
    real, fake, share = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([0.25])
    assert gradient_penalty(lambda x: x.square().squeeze(1), real, fake, share).item() == pytest.approx((2 * 1.5 - 1) ** 2)


def test_a_flat_discriminator_gives_no_nan():
    weight = torch.zeros(2, requires_grad=True)
    gradient_penalty(lambda x: x @ weight, torch.ones(3, 2), torch.zeros(3, 2), torch.rand(3)).backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("key", ["gradient_penalty", "r1", "r2"])
def test_penalties_refuse_batch_normalisation(key):
    with pytest.raises(UserError, match=f"objective.{key}: 1 .*model.discriminator_norm batch.*use group or none"):
        check_losses(GANObjectiveSettings(**{key: 1.0}), "batch", False)
    check_losses(GANObjectiveSettings(**{key: 1.0}), "group", False)


def test_wasserstein_wants_a_bounded_slope():
    with pytest.raises(UserError, match="objective.loss: wasserstein"):
        check_losses(GANObjectiveSettings(loss="wasserstein"), "none", False)
    check_losses(GANObjectiveSettings(loss="wasserstein"), "none", True)
    check_losses(GANObjectiveSettings(loss="wasserstein", gradient_penalty=10.0), "none", False)
