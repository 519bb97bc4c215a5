"""The family `points`: a GAN on a mixture of Gaussians in the plane, judged by the modes it finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.data.images.grouped import packed
from genscale.data.lanes import Data, Sample
from genscale.errors import UserError
from genscale.families.points.data import MIXTURES, Mixture, PointsData, PointsDataSettings
from genscale.families.points.settings import PointsGANSettings
from genscale.models.mlp_gan import MLPDiscriminator, MLPGenerator, spread_kinks
from genscale.objectives.base import Batch, Blueprint, Networks
from genscale.objectives.gan import GAN
from genscale.objectives.gan_settings import GANObjectiveSettings, check_batch, check_losses
from genscale.settings.config import Config

NEAR = 3.0
"""A point is of high quality within so many standard deviations of a mode."""
PREVIEW_POINTS = 1000
PREVIEW_INCHES = 4


class PointsGAN(GAN):
    """A GAN on points. A batch holds `point`, float32 `(batch, 2)` or `(batch, pack, 2)`."""

    unit = "points"
    loss_unit = "share of modes missed + share of points off"
    higher_is_better = frozenset({"modes", "high_quality"})

    def __init__(self, generator: torch.nn.Module, discriminator: torch.nn.Module, settings: GANObjectiveSettings, *,
                 mixture: Mixture, **options: Any) -> None:
        super().__init__(generator, discriminator, settings, **options)
        self.mixture = mixture

    def reals(self, batch: Batch) -> Tensor:
        """The points."""
        return batch["point"]

    def generate(self, networks: Networks, latents: Tensor) -> Tensor:
        """Points fp32 `(batch, 2)` from latents `(batch, latent)`."""
        return networks["generator"](latents).float()

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """As many generated points as the batch has."""
        return {"points": self.generate(networks, self.latents("evaluation", batch["sample"], batch["point"].device))}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """PacGAN's protocol (Lin et al. 2018, section 4.1): a point is of high quality within three standard deviations of its
        nearest mode; a mode is found where at least one point of high quality is nearest to it."""
        found, quality = modes_and_quality(totals["points"], self.mixture)
        missed = 1 - found / len(self.mixture.centers)
        return {"loss": missed + 1 - quality, "modes": found, "high_quality": quality}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """Generated points over the modes."""
        points = self.generate(networks, self.latents("preview", torch.arange(PREVIEW_POINTS), device))
        return draw_points(points.cpu().numpy(), self.mixture)


def modes_and_quality(points: Tensor, mixture: Mixture) -> tuple[int, float]:
    """(modes found, share of points `(n, 2)` of high quality)."""
    distances = torch.cdist(points.double().cpu(), torch.from_numpy(mixture.centers))
    nearest, mode = distances.min(1)
    good = nearest <= NEAR * mixture.std
    return len(mode[good].unique()), good.double().mean().item()


def draw_points(points: np.ndarray, mixture: Mixture) -> np.ndarray:
    """A picture of points `(n, 2)` over circles of the distance within which they are of high quality, uint8 `(height, width,
    3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(PREVIEW_INCHES, PREVIEW_INCHES), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    for center in mixture.centers:
        axes.add_patch(Circle(center, NEAR * mixture.std, fill=False, color="#d1602b"))
    axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.5, color="#3b76af", linewidths=0)
    limit = 1.3 * np.abs(mixture.centers).max()
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    if outside := len(points) - int((np.abs(points) <= limit).all(1).sum()):
        axes.set_title(f"{outside:,} of {len(points):,} points lie outside", fontsize="small")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


PointsConfig = Config[PointsGANSettings, PointsDataSettings, GANObjectiveSettings]


def build_data(settings: PointsDataSettings, seed: int) -> Data:
    return packed(PointsData(settings, seed), settings.pack)


def validation(settings: PointsDataSettings, seed: int) -> list[Sample]:
    return PointsData(settings, seed).validation()


def build(config: PointsConfig, data: Data) -> PointsGAN:
    """The objective of a run. Raises UserError as `restore` does, and for a batch of too few points."""
    check_batch(config.train, (config.model.generator_norm, config.model.discriminator_norm))
    return restore(config)


def blueprint(config: PointsConfig) -> Blueprint:
    """What a step is planned of. Raises UserError as `build` does."""
    check_batch(config.train, (config.model.generator_norm, config.model.discriminator_norm))
    pack = config.data.pack
    sample = torch.empty((pack, 2) if pack > 1 else (2,), device="meta")
    return Blueprint(restore(config), {"point": sample})


def restore(config: PointsConfig, folder: Path | None = None) -> PointsGAN:
    """The objective of a run, trained or not.

    Raises:
        UserError: losses that the networks do not suit; more signs than a latent has entries.
    """
    model, pack = config.model, config.data.pack
    if model.latent_signs > model.latent:
        raise UserError(f"model.latent_signs: {model.latent_signs} is more than model.latent, {model.latent}; nearest allowed: "
                        f"{model.latent}")
    check_losses(config.objective, model.discriminator_norm, model.spectral_norm)
    if config.objective.augmentation:
        raise UserError(f"objective.augmentation: {', '.join(config.objective.augmentation)} is for images, and model.family "
                        "points has none; leave it empty")
    with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
        generator = MLPGenerator(model, (2,), bounded=False, signs=model.latent_signs)
        discriminator = MLPDiscriminator(model, (2 * pack,))
    mixture = MIXTURES[config.data.source]
    spread_kinks(generator.hidden, 1.0)
    spread_kinks(discriminator.hidden, float(mixture.centers.std()))
    return PointsGAN(generator, discriminator, config.objective, mixture=mixture, seed=config.run.seed,
                     latent=model.latent, pack=pack, initial_std=None)
