"""What the networks of a GAN minimise: the `objective` section of the families `dcgan` and `points`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from genscale.errors import UserError, refuse_unheeded
from genscale.models.norms import Norm
from genscale.settings.config import TrainSettings

LossName = Literal["non_saturating", "hinge", "wasserstein", "least_squares", "relativistic"]
Augmentation = Literal["color", "translation", "cutout"]


@dataclass(frozen=True)
class GANObjectiveSettings:
    """Losses and regularisers of a GAN."""

    loss: LossName = "non_saturating"
    """non_saturating (Goodfellow et al. 2014), hinge, wasserstein, least_squares, or relativistic (pairs of a real and a
    fake)."""
    discriminator_steps: PositiveInt = 1
    """Updates of the discriminator for each of the generator, each on a global batch of its own."""
    gradient_penalty: NonNegativeFloat = 0.0
    """Weight of the penalty on slopes other than 1 between reals and fakes (WGAN-GP: 10); computed in fp32."""
    r1: NonNegativeFloat = 0.0
    """Weight of the penalty on slopes at real images (Mescheder et al. 2018); computed in fp32."""
    r2: NonNegativeFloat = 0.0
    """The same at generated images."""
    regularise_every: PositiveInt = 16
    """Steps between updates by r1 and r2, which then count so many times (Karras et al. 2020)."""
    augmentation: list[Augmentation] = field(default_factory=list)
    """Change what the discriminator sees: any of color, translation, cutout (Zhao et al. 2020). For few images."""


def check_batch(train: TrainSettings, norms: Iterable[Norm]) -> None:
    """Raises UserError where the batch normalisation of a perceptron would see one value alone, and make 0 of it."""
    for key, size in (("micro_batch_size", train.micro_batch_size), ("global_batch_size", train.global_batch_size)):
        if size == 1 and "batch" in norms:
            raise UserError(f"train.{key}: 1 sample has no deviation for a norm over the batch to divide by; set 2 or more, "
                            "or model.generator_norm and model.discriminator_norm to group or none")


def check_losses(settings: GANObjectiveSettings, discriminator_norm: str, spectral_norm: bool) -> None:
    """Raises UserError for losses that the discriminator does not suit, and for a setting of none."""
    if not settings.r1 and not settings.r2:
        refuse_unheeded("objective", settings, ["regularise_every"], "neither objective.r1 nor objective.r2")
    for key in ("gradient_penalty", "r1", "r2"):
        if getattr(settings, key) and discriminator_norm == "batch":
            raise UserError(f"objective.{key}: {getattr(settings, key):g} is a penalty for each image alone, and with "
                            "model.discriminator_norm batch a logit depends on the other images; use group or none")
    if settings.loss == "wasserstein" and not settings.gradient_penalty and not spectral_norm:
        raise UserError("objective.loss: wasserstein needs a discriminator of bounded slope; set objective.gradient_penalty 10 "
                        "or model.spectral_norm true")
