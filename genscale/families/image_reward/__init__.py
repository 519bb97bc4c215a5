"""The family `image_reward`: pictures by reward, of a policy that begins from a trained run and is paid to stay near it."""

from __future__ import annotations

from types import ModuleType

from genscale.evaluation.settings import ImageSampling
from genscale.families.entry import Family, Sampler, Sampling
from genscale.families.image_reward.settings import DrawnDataSettings, ImageRewardObjectiveSettings, ImageRewardSettings
from genscale.objectives.capabilities import BeginsFromRun, GeneratesImages


def _module() -> ModuleType:
    from genscale.families.image_reward import objective as image_reward

    return image_reward


def _sampler() -> Sampler:
    from genscale.evaluation.image_sampling import sample_images

    return sample_images


FAMILY = Family(
    ImageRewardSettings, DrawnDataSettings, _module, ImageRewardObjectiveSettings,
    sampling=Sampling(ImageSampling, _sampler, needs=(GeneratesImages,), example="--count 64 --out grid.png"),
    capabilities=(BeginsFromRun,),
    tiny={"model.layers": 2, "model.width": 8, "objective.group": 4, "objective.rewards": [{"name": "brightness"}],
          "data.validation_groups": 8},
    tiny_from="vae",
)  # fmt: skip
