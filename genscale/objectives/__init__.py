"""The families: what `model.family` can be. A new family is one entry here."""

from __future__ import annotations

from types import ModuleType

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


def _language_model() -> ModuleType:
    from genscale.objectives import language_model

    return language_model


def _image_gan() -> ModuleType:
    from genscale.objectives import image_gan

    return image_gan


def _points() -> ModuleType:
    from genscale.objectives import points

    return points


def _vae() -> ModuleType:
    from genscale.objectives import vae

    return vae


def _vae_gan() -> ModuleType:
    from genscale.objectives import vae_gan

    return vae_gan


FAMILIES: dict[str, Family] = {
    "gpt": Family(GPTSettings, TextDataSettings, _language_model),
    "dcgan": Family(GANSettings, PackedImageDataSettings, _image_gan, GANObjectiveSettings),
    "points": Family(PointsGANSettings, PointsDataSettings, _points, GANObjectiveSettings),
    "vae": Family(VAESettings, ImageDataSettings, _vae, VAEObjectiveSettings),
    "vae_gan": Family(VAEGANSettings, ImageDataSettings, _vae_gan, VAEGANObjectiveSettings),
}
