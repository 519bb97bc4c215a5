"""The family `vae_gan`: autoencoders of images that a discriminator judges."""

from __future__ import annotations

from types import ModuleType

from genscale.data.images.settings import ImageDataSettings
from genscale.evaluation.settings import ImageSampling, ImageScoring
from genscale.families.entry import Family, Sampler, Sampling, Scorer, Scoring
from genscale.families.vae.objective_settings import VAEGANObjectiveSettings
from genscale.families.vae.settings import VAEGANSettings
from genscale.objectives.capabilities import EncodesImages, GeneratesImages


def _module() -> ModuleType:
    from genscale.families.vae_gan import objective as vae_gan

    return vae_gan


def _sampler() -> Sampler:
    from genscale.evaluation.image_sampling import sample_images

    return sample_images


def _scorer() -> Scorer:
    from genscale.evaluation.image_scores import score_images

    return score_images


FAMILY = Family(
    VAEGANSettings, ImageDataSettings, _module, VAEGANObjectiveSettings,
    sampling=Sampling(ImageSampling, _sampler, needs=(GeneratesImages,), example="--count 64 --out grid.png"),
    scoring=Scoring(ImageScoring, _scorer, needs=(GeneratesImages,), tiny={"features": "random", "count": 80}),
    capabilities=(EncodesImages,),
    tiny={"model.width": 8, "model.multipliers": [1, 2], "model.latents": 4, "model.discriminator_width": 4,
          "data.source": "digits", "data.size": 16, "data.channels": 1, "data.validation_images": 80},
)  # fmt: skip
