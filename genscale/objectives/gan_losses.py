"""Losses of generative adversarial networks on logits `(batch,)`, summed over the batch, in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.objectives.gan_settings import LossName


def discriminator_loss(name: LossName, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, a scalar.

    non_saturating: Goodfellow et al. 2014, binary cross-entropy on logits. hinge: Lim and Ye 2017. wasserstein: Arjovsky et al.
    2017. least_squares: Mao et al. 2017. relativistic: each real against the fake beside it (Jolicoeur-Martineau 2018).
    """
    real, fake = real.float(), fake.float()
    if name == "non_saturating":
        return (F.softplus(-real) + F.softplus(fake)).sum()
    if name == "hinge":
        return (F.relu(1 - real) + F.relu(1 + fake)).sum()
    if name == "wasserstein":
        return (fake - real).sum()
    if name == "least_squares":
        return 0.5 * ((real - 1).square() + fake.square()).sum()
    return F.softplus(fake - real).sum()


def generator_loss(name: LossName, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the generator minimises, a scalar; `real` is wanted by the relativistic loss alone."""
    fake = fake.float()
    if name == "non_saturating":
        return F.softplus(-fake).sum()
    if name == "least_squares":
        return 0.5 * (fake - 1).square().sum()
    if name == "relativistic":
        assert real is not None
        return F.softplus(real.float() - fake).sum()
    return -fake.sum()


def squared_slopes(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norm of the gradient of each logit by its image, `(batch,)`, to be differentiated once more; and the logits."""
    images = images.detach().requires_grad_()
    logits = discriminator(images)
    (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return slopes.float().flatten(1).square().sum(1), logits


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Sum of (slope - 1)^2 at points between reals and fakes (Gulrajani et al. 2017, equation 3).

    Args:
        share: `(batch,)` in [0, 1): how far from fake to real each point lies.
    """
    share = share.reshape(-1, *[1] * (real.ndim - 1))
    squares, logits = squared_slopes(discriminator, share * real + (1 - share) * fake)
    # The root's own slope is infinite at 0, where a discriminator that sees nothing would give NaN.
    return ((squares + 1e-12).sqrt() - 1).square().sum() + 0 * logits.sum()


def zero_centred_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Sum of half the squared slopes: R1 on real images, R2 on generated ones (Mescheder et al. 2018, equation 9).

    The logits are in it times 0, so that every parameter of the discriminator gets a gradient.
    """
    squares, logits = squared_slopes(discriminator, images)
    return 0.5 * squares.sum() + 0 * logits.sum()
