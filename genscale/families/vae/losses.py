"""Bounds on the likelihood of an image, and what may weigh the divergence in them. Pure functions, in nats, in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.errors import UserError, refuse_unheeded
from genscale.families.vae.objective_settings import VAEObjectiveSettings


def check_objective(settings: VAEObjectiveSettings, likelihood: str) -> None:
    """Raises UserError for settings that do not go together."""
    if settings.capacity is None:
        refuse_unheeded("objective", settings, ["capacity_steps", "capacity_weight"], "no objective.capacity")
    weighted = [f"{key} {value}" for key, value, plain in (
        ("beta", settings.beta, 1.0), ("kl_warmup_steps", settings.kl_warmup_steps, 0), ("free_bits", settings.free_bits, 0.0))
        if value != plain]
    if settings.capacity is not None and weighted:
        raise UserError(f"objective.capacity: {settings.capacity} takes the place of beta x divergence, which {weighted[0]} "
                        f"changes; leave objective.{weighted[0].split()[0]} out, or objective.capacity")
    if settings.importance_samples > 1 and (weighted or settings.capacity is not None):
        changed = weighted[0] if weighted else f"capacity {settings.capacity}"
        raise UserError(f"objective.importance_samples: the bound of {settings.importance_samples} samples has no divergence "
                        f"for objective.{changed} to change; leave that out, or set objective.importance_samples 1")
    if settings.binarise != "none" and likelihood != "bernoulli":
        raise UserError(f"objective.binarise: {settings.binarise} makes images of black and white alone, and model.likelihood "
                        f"{likelihood} is one of grey levels; set model.likelihood bernoulli, or objective.binarise none")


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent dimension (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def weighted_divergence(kl: Tensor, settings: VAEObjectiveSettings, step: int) -> Tensor:
    """What the divergence costs each image, `(batch,)`, at this step; `kl` is `(batch, ...)`, of each latent dimension."""
    if settings.capacity is not None:
        allowed = settings.capacity * min(1.0, step / settings.capacity_steps)
        return settings.capacity_weight * (kl.flatten(1).sum(1) - allowed).abs()
    share = min(1.0, step / settings.kl_warmup_steps) if settings.kl_warmup_steps else 1.0
    return settings.beta * share * kl.clamp(min=settings.free_bits).flatten(1).sum(1)


def log_weights(reconstruction: Tensor, latents: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log p(x, z) - log q(z | x) of each latent, `(batch, samples)`.

    Args:
        reconstruction: -log p(x | z), `(batch, samples)`.
        latents: `(batch, samples, ...)`, drawn from the posterior.
        mean, log_variance: of the posterior, `(batch, ...)`.
    """
    mean, log_variance = mean[:, None], log_variance[:, None]
    # Of log p(z) - log q(z | x) the constants cancel.
    ratio = 0.5 * ((latents - mean).square() * (-log_variance).exp() + log_variance - latents.square())
    return ratio.flatten(2).sum(2) - reconstruction


def importance_bound(weights: Tensor) -> Tensor:
    """log of the mean weight, `(batch,)`, of the logarithms of the weights `(batch, samples)`: in expectation a lower bound of
    log p(x), tighter with more samples (Burda et al. 2016)."""
    return torch.logsumexp(weights, 1) - math.log(weights.shape[1])
