"""`genscale evaluate` beyond the validation metrics, for the families that have more. A new family is one entry in SCORERS, and
one in `settings.SCORING`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from genscale.evaluation.image_scores import score_images
from genscale.evaluation.trained_run import TrainedRun

Scorer = Callable[[TrainedRun, Any], dict[str, Any]]
SCORERS: dict[str, Scorer] = {"dcgan": score_images, "vae": score_images, "vae_gan": score_images}
