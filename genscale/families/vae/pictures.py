"""What the objectives with an encoder show of themselves, and where they take images from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.lanes import Sample
from genscale.models.image_grid import grid_of_rows
from genscale.models.image_layers import to_unit
from genscale.objectives.base import Networks
from genscale.rng import torch_generator

EXAMPLES = 8
SAMPLE_ROWS = 3


def examples_of(data: ImageData) -> Callable[[], Tensor]:
    """The first images of the validation set, uint8 `(n, channels, size, size)`, read when they are asked for."""
    return lambda: torch.from_numpy(np.stack([sample["image"] for sample in data.validation()[:EXAMPLES]]))


def validation_images(settings: ImageDataSettings, seed: int) -> list[Sample]:
    """The validation samples of a run's data."""
    return ImageData(settings, seed, for_training=False).validation()


def preview_latents(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Latents `(n, *shape)` from the prior, the same each time."""
    return torch.randn(SAMPLE_ROWS * EXAMPLES, *shape, generator=torch_generator(seed, "preview"))


def preview_picture(objective: Any, networks: Networks, seed: int, device: torch.device, examples: Callable[[], Tensor] | None,
                    seen: Callable[[Tensor], Tensor] = to_unit) -> np.ndarray:
    """Examples as the network sees them above their reconstructions, where there are some, and samples from the prior below.

    Args:
        objective: with `generate`, `encode` and `latent_shape`.
        examples: gives uint8 images.
        seen: makes of them what is shown.
    """
    samples = objective.generate(networks, preview_latents(seed, objective.latent_shape).to(device))
    if examples is None:
        return grid_of_rows({"sample": samples}, EXAMPLES)
    images = examples().to(device)
    outputs = objective.generate(networks, objective.encode(networks, images)[0])
    return grid_of_rows({"input": to_unit(seen(images)), "output": outputs, "sample": samples}, EXAMPLES)
