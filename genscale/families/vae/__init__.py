"""The family `vae`: variational autoencoders of images."""

from __future__ import annotations

from types import ModuleType

from genscale.data.images.settings import ImageDataSettings
from genscale.families.entry import Family
from genscale.families.generated_images import IMAGE_SAMPLING, IMAGE_SCORING
from genscale.families.vae.objective_settings import VAEObjectiveSettings
from genscale.families.vae.settings import VAESettings
from genscale.objectives.capabilities import EncodesImages, MeasuresLikelihood


def _module() -> ModuleType:
    from genscale.families.vae import objective as vae

    return vae


FAMILY = Family(
    VAESettings, ImageDataSettings, _module, VAEObjectiveSettings,
    sampling=IMAGE_SAMPLING, scoring=IMAGE_SCORING,
    capabilities=(EncodesImages, MeasuresLikelihood),
    tiny={"model.width": 8, "model.multipliers": [1, 2], "model.latents": 4, "data.source": "digits", "data.size": 16,
          "data.channels": 1, "data.validation_images": 80},
)  # fmt: skip
