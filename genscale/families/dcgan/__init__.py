"""The family `dcgan`: GANs on images."""

from __future__ import annotations

from types import ModuleType

from genscale.data.images.settings import PackedImageDataSettings
from genscale.evaluation.settings import ImageSampling, ImageScoring
from genscale.families.dcgan.settings import GANSettings
from genscale.families.entry import Family, Sampler, Sampling, Scorer, Scoring
from genscale.objectives.capabilities import GeneratesImages
from genscale.objectives.gan_settings import GANObjectiveSettings


def _module() -> ModuleType:
    from genscale.families.dcgan import objective as image_gan

    return image_gan


def _sampler() -> Sampler:
    from genscale.evaluation.image_sampling import sample_images

    return sample_images


def _scorer() -> Scorer:
    from genscale.evaluation.image_scores import score_images

    return score_images


FAMILY = Family(
    GANSettings, PackedImageDataSettings, _module, GANObjectiveSettings,
    sampling=Sampling(ImageSampling, _sampler, needs=(GeneratesImages,), example="--count 64 --out grid.png"),
    scoring=Scoring(ImageScoring, _scorer, needs=(GeneratesImages,), with_validation=False,
                    tiny={"features": "random", "count": 80}),
    tiny={"model.width": 4, "model.latent": 8, "data.source": "digits", "data.size": 16, "data.channels": 1,
          "data.validation_images": 80},
)  # fmt: skip
