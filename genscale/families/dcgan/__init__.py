"""The family `dcgan`: GANs on images."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from genscale.data.images.settings import PackedImageDataSettings
from genscale.families.dcgan.settings import GANSettings
from genscale.families.entry import Family
from genscale.families.generated_images import IMAGE_SAMPLING, IMAGE_SCORING
from genscale.objectives.gan_settings import GANObjectiveSettings


def _module() -> ModuleType:
    from genscale.families.dcgan import objective as image_gan

    return image_gan


FAMILY = Family(
    GANSettings, PackedImageDataSettings, _module, GANObjectiveSettings,
    sampling=IMAGE_SAMPLING, scoring=replace(IMAGE_SCORING, with_validation=False),
    tiny={"model.width": 4, "model.latent": 8, "data.source": "digits", "data.size": 16, "data.channels": 1,
          "data.validation_images": 80},
)  # fmt: skip
