"""`genscale evaluate` beyond the validation metrics, for the families that have more. A new family is one line in SCORERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from genscale.evaluation.image_scores import ImageScoring, score_images
from genscale.evaluation.trained_run import TrainedRun


@dataclass(frozen=True)
class Scorer:
    """A family's settings dataclass (flags of the verb) and what to do with them."""

    settings: type
    run: Callable[[TrainedRun, Any], dict[str, Any]]


IMAGES = Scorer(ImageScoring, score_images)
SCORERS = {"dcgan": IMAGES, "vae": IMAGES, "vae_gan": IMAGES}
