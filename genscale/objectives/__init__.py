"""The families: what `model.family` can be. A new family is one entry here."""

from __future__ import annotations

from genscale.data.image_settings import ImageDataSettings, PackedImageDataSettings
from genscale.data.points_settings import PointsDataSettings
from genscale.data.text_settings import TextDataSettings
from genscale.models.gan_settings import GANSettings
from genscale.models.gpt_settings import GPTSettings
from genscale.models.points_settings import PointsGANSettings
from genscale.models.vae_settings import VAEGANSettings, VAESettings
from genscale.objectives.family import Family
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.objectives.vae_settings import VAEGANObjectiveSettings, VAEObjectiveSettings

FAMILIES: dict[str, Family] = {
    "gpt": Family(GPTSettings, TextDataSettings, "genscale.objectives.language_model"),
    "dcgan": Family(GANSettings, PackedImageDataSettings, "genscale.objectives.image_gan", GANObjectiveSettings),
    "points": Family(PointsGANSettings, PointsDataSettings, "genscale.objectives.points", GANObjectiveSettings),
    "vae": Family(VAESettings, ImageDataSettings, "genscale.objectives.vae", VAEObjectiveSettings),
    "vae_gan": Family(VAEGANSettings, ImageDataSettings, "genscale.objectives.vae_gan", VAEGANObjectiveSettings),
}
