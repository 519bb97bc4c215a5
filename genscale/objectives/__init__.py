"""The families: what `model.family` can be. A new built-in one is one entry here; see `registry` for others."""

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
from genscale.objectives.registry import Families
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


FAMILIES = Families({
    "gpt": Family(GPTSettings, TextDataSettings, _language_model),
    "dcgan": Family(GANSettings, PackedImageDataSettings, _image_gan, GANObjectiveSettings),
    "points": Family(PointsGANSettings, PointsDataSettings, _points, GANObjectiveSettings),
    "vae": Family(VAESettings, ImageDataSettings, _vae, VAEObjectiveSettings),
    "vae_gan": Family(VAEGANSettings, ImageDataSettings, _vae_gan, VAEGANObjectiveSettings),
})


def register(family: Family) -> None:
    """Make a family of one's own known to this process: to a config whose `model.family` is its name, to every verb, and to the
    processes that run the same script (`accelerate launch my_script.py`, torchrun, `python my_script.py train --processes 2`).
    A job of `genscale slurm submit` runs genscale itself, and knows only what is installed (`genscale.objectives.registry`).

    Raises:
        ValueError: the name is that of a built-in family.
    """
    FAMILIES.register(family)
