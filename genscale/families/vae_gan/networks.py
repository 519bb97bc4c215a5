"""The networks of a VAE-GAN (Larsen et al. 2016, "Autoencoding beyond pixels using a learned similarity metric"): a VAE's
encoder, its decoder as a generator, and a discriminator that shows its features."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.errors import UserError
from genscale.families.dcgan.networks import DiscriminatorStages, DownStage
from genscale.families.dcgan.settings import GANSettings, check_gan
from genscale.families.vae.network import DecoderLayers
from genscale.families.vae.settings import VAEGANSettings, VAESettings


def networks_settings(settings: VAEGANSettings, shape: tuple[int, int, int]) -> tuple[VAESettings, GANSettings]:
    """The settings of encoder and decoder, and of the discriminator.

    Raises:
        UserError: settings that such images cannot have.
    """
    discriminator = GANSettings(width=settings.discriminator_width or settings.width, spectral_norm=settings.spectral_norm,
                                discriminator_norm=settings.discriminator_norm)
    check_gan(discriminator, shape)
    # The decoder's output is the image itself: no likelihood of pixels, no scale.
    vae = VAESettings(width=settings.width, multipliers=settings.multipliers, blocks=settings.blocks, norm=settings.norm,
                      attention=settings.attention, latents=settings.latents, likelihood="gaussian", scale="fixed")
    return vae, discriminator


class ImageDecoder(DecoderLayers):
    """Latents `(batch, latents)` to images fp32 `(batch, channels, size, size)` in [-1, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        location, _ = self.pixels(latents)
        return location.tanh()


class FeatureDiscriminator(DiscriminatorStages):
    """Images to logits and to the features of one stage.

    Args:
        settings, shape: of a DCGAN's discriminator.
        stage: 1 for the first; None: the one before the last.

    Raises:
        UserError: there is no such stage.
    """

    stage = DownStage

    def __init__(self, settings: GANSettings, shape: tuple[int, int, int], stage: int | None = None) -> None:
        super().__init__(settings, shape)
        count = len(self.stages)
        self.feature_stage = stage or max(1, count - 1)
        if self.feature_stage > count:
            raise UserError(f"model.feature_stage: {stage} is more than the {count} stages of a discriminator of images of "
                            f"{shape[-1]} pixels; nearest allowed: {count}")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(batch,)`, above 0 where the images are taken for real, and features `(batch, width)`, both fp32."""
        x = images.to(memory_format=torch.channels_last)
        features = x
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            if number == self.feature_stage:
                features = x
        return self.head(x, None).float(), features.float().flatten(1)
