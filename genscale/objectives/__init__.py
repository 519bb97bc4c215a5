"""The families: what `model.family` can be. A new family is one line here."""

from __future__ import annotations

from genscale.objectives.base import Family
from genscale.objectives.image_gan import FAMILY as DCGAN
from genscale.objectives.language_model import FAMILY as GPT
from genscale.objectives.points import FAMILY as POINTS
from genscale.objectives.vae import FAMILY as VAE
from genscale.objectives.vae_gan import FAMILY as VAE_GAN

FAMILIES: dict[str, Family] = {"gpt": GPT, "dcgan": DCGAN, "points": POINTS, "vae": VAE, "vae_gan": VAE_GAN}
