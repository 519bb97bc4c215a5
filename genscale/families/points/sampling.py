"""`genscale sample` for the family `points`: a picture of generated points over the modes, or their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch

from genscale.evaluation.image_generation import latents
from genscale.evaluation.sample_files import picture_of_run, write_array, write_picture
from genscale.evaluation.settings import PointSampling
from genscale.evaluation.trained_run import TrainedRun
from genscale.families.points.objective import PointsGAN, draw_points


@torch.no_grad()
def sample_points(run: TrainedRun, settings: PointSampling) -> None:
    """Write the points, and say where.

    Raises:
        UserError: the file cannot be written.
    """
    objective, parts = cast(PointsGAN, run.objective), []  # the family whose sampler this is
    for numbers in torch.arange(settings.count).split(settings.batch_size):
        drawn = latents(objective, settings.seed, numbers).to(run.device)
        parts.append(objective.generate(run.networks, drawn).cpu().numpy())
    points = np.concatenate(parts)
    file = Path(settings.out) if settings.out else picture_of_run(run.folder, f"sample-seed{settings.seed}")
    if file.suffix in (".npz", ".csv"):
        write_array(file, "points", points)
    else:
        write_picture(file, draw_points(points, objective.mixture))
    print(f"{file} ({settings.count:,} points)")
