"""The likelihood of the validation images under a VAE, by importance sampling."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from genscale.data.lanes import Sample
from genscale.evaluation.trained_run import TrainedRun
from genscale.objectives.capabilities import MeasuresLikelihood

BATCH_SIZE = 8
"""Images at once; each is decoded with a hundred latents."""


def likelihood(run: TrainedRun, samples: list[Sample], importance_samples: int) -> dict[str, Any]:
    """Mean log-likelihood in nats an image, with the standard error over images (Burda et al. 2016); under another name where
    it is none."""
    objective, nats = cast(MeasuresLikelihood, run.objective), []  # for whose families this is called
    measures = objective.measures_of(torch.from_numpy(np.stack([sample["image"] for sample in samples])))
    with tqdm(total=len(samples), desc=measures.of_image, unit="image", disable=None, file=sys.stderr) as bar:
        for start in range(0, len(samples), BATCH_SIZE):
            part = samples[start : start + BATCH_SIZE]
            batch = {"image": torch.from_numpy(np.stack([sample["image"] for sample in part])).to(run.device),
                     "sample": torch.arange(start, start + len(part), device=run.device)}
            nats.append(objective.log_likelihood(run.networks, batch, importance_samples).cpu())
            bar.update(len(part))
    values = torch.cat(nats)
    return {measures.of_image: measures.sign * values.mean().item(),
            f"{measures.of_image}_standard_error": values.std().item() / math.sqrt(len(values)),
            "likelihood": run.config.model.likelihood, "binarise": run.config.objective.binarise,
            "importance_samples": importance_samples}
