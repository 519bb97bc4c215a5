"""Images from a trained generator or decoder: image i of a seed is the same in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from genscale.errors import UserError
from genscale.evaluation.trained_run import TrainedRun
from genscale.objectives.capabilities import Generates, GeneratesImages
from genscale.rng import Draws


def maker_of_images(run: TrainedRun) -> GeneratesImages:
    """The run's objective as what its family has called it, which was looked at when it was built."""
    return cast(GeneratesImages, run.objective)


def latents(objective: Generates | GeneratesImages, seed: int, numbers: Tensor) -> Tensor:
    """Standard normal latents `(n, *latent_shape)` of the images of these numbers."""
    return Draws(seed, "generate", 0, numbers).normal("latent", *objective.latent_shape)


@torch.no_grad()
def decoded(run: TrainedRun, drawn: Tensor, labels: Tensor | None, batch_size: int) -> Iterator[Tensor]:
    """Images uint8 `(batch, channels, size, size)` on the CPU, of latents `(n, *latent_shape)`; computed in fp32.

    Args:
        labels: int64 `(n,)`, where the run is conditional.

    Raises:
        UserError: they are no numbers.
    """
    for start in range(0, len(drawn), batch_size):
        part = drawn[start : start + batch_size].to(run.device)
        classes = None if labels is None else labels[start : start + batch_size].to(run.device)
        images = maker_of_images(run).generate(run.networks, part, classes)
        if not images.isfinite().all():
            raise UserError("model: what the network generates is no number: its weights have diverged; take an earlier "
                            "checkpoint (--step), or train with a lower optimizer.lr")
        yield as_uint8(images)


def as_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit ones on the CPU. What is no number is black."""
    return (images.float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte().cpu()
