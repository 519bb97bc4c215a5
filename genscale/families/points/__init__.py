"""The family `points`: GANs on a mixture of Gaussians in the plane."""

from __future__ import annotations

from types import ModuleType

from genscale.evaluation.settings import PointSampling
from genscale.families.entry import Family, Sampler, Sampling
from genscale.families.points.settings import PointsDataSettings, PointsGANSettings
from genscale.objectives.capabilities import Generates
from genscale.objectives.gan_settings import GANObjectiveSettings


def _module() -> ModuleType:
    from genscale.families.points import objective as points

    return points


def _sampler() -> Sampler:
    from genscale.families.points.sampling import sample_points

    return sample_points


FAMILY = Family(
    PointsGANSettings, PointsDataSettings, _module, GANObjectiveSettings,
    sampling=Sampling(PointSampling, _sampler, needs=(Generates,), example="--out points.png"),
    tiny={"model.width": 16, "data.validation_points": 100},
)  # fmt: skip
