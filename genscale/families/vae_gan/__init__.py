"""The family `vae_gan`: autoencoders of images that a discriminator judges."""

from __future__ import annotations

from types import ModuleType

from genscale.data.images.settings import ImageDataSettings
from genscale.families.entry import Family
from genscale.families.generated_images import IMAGE_SAMPLING, IMAGE_SCORING
from genscale.families.vae.objective_settings import VAEGANObjectiveSettings
from genscale.families.vae.settings import VAEGANSettings
from genscale.objectives.capabilities import EncodesImages


def _module() -> ModuleType:
    from genscale.families.vae_gan import objective as vae_gan

    return vae_gan


FAMILY = Family(
    VAEGANSettings, ImageDataSettings, _module, VAEGANObjectiveSettings,
    sampling=IMAGE_SAMPLING, scoring=IMAGE_SCORING,
    capabilities=(EncodesImages,),
    tiny={"model.width": 8, "model.multipliers": [1, 2], "model.latents": 4, "model.discriminator_width": 4,
          "data.source": "digits", "data.size": 16, "data.channels": 1, "data.validation_images": 80},
)  # fmt: skip
