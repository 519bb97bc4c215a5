"""What `genscale sample` and `genscale evaluate` make of a run of any family that generates images."""

from __future__ import annotations

from genscale.evaluation.settings import ImageSampling, ImageScoring
from genscale.families.entry import Sampler, Sampling, Scorer, Scoring
from genscale.objectives.capabilities import GeneratesImages


def _sampler() -> Sampler:
    from genscale.evaluation.image_sampling import sample_images

    return sample_images


def _scorer() -> Scorer:
    from genscale.evaluation.image_scores import score_images

    return score_images


IMAGE_SAMPLING = Sampling(ImageSampling, _sampler, needs=(GeneratesImages,), example="--count 64 --out grid.png")
"""Writes images as files or as one picture."""
IMAGE_SCORING = Scoring(ImageScoring, _scorer, needs=(GeneratesImages,), tiny={"features": "random", "count": 80})
"""Compares generated images with held-out ones."""
