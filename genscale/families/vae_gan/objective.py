"""The VAE-GAN (Larsen et al. 2016): a VAE whose reconstructions are measured by what a discriminator sees in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.lanes import Sample
from genscale.families.vae.losses import divergence
from genscale.families.vae.network import Encoder
from genscale.families.vae.objective_settings import VAEGANObjectiveSettings
from genscale.families.vae.pictures import examples_of, preview_picture, validation_images
from genscale.families.vae.settings import VAEGANSettings
from genscale.families.vae_gan.networks import FeatureDiscriminator, ImageDecoder, networks_settings
from genscale.models.feature_network import RandomFeatures
from genscale.models.image_layers import to_signed, to_unit
from genscale.models.initial_weights import InitialWeights
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.objectives.sample_quality import distance, distance_units
from genscale.rng import Draws
from genscale.settings.config import Config


class VAEGANObjective(Objective):
    """Trains `encoder`, `decoder` and `discriminator`, each in a phase of its own while the other two are frozen.

    The reconstruction is -log N(features of the image | features of its reconstruction, 1) without its constant, the features
    being those of one stage of the discriminator (equations 6 and 7 of the paper). The phases of a step, over one batch:

    - encoder: reconstruction + beta x KL;
    - decoder: reconstruction_weight x reconstruction + the discriminator's judgement of reconstructions and samples, in the
      non-saturating form (Goodfellow et al. 2014);
    - discriminator: images against reconstructions and samples. No reconstruction: it would learn to see nothing.

    Args:
        networks: by name.
        settings: weights.
        shape: `(channels, size, size)` of images.
        latents: length of the latent.
        seed: the run's.
        examples: gives uint8 images to show reconstructions of, or nothing.
    """

    unit = "images"
    loss_unit = "Frechet distance, random features"
    averaged = ("encoder", "decoder")
    class_names = None

    def __init__(self, networks: dict[str, nn.Module], settings: VAEGANObjectiveSettings, shape: tuple[int, int, int], *,
                 latents: int, seed: int, examples: Callable[[], Tensor] | None = None) -> None:
        self.networks, self.settings, self.image_shape, self.seed = networks, settings, shape, seed
        self.latent_shape, self._examples = (latents,), examples
        self._weights = {name: InitialWeights(network, seed) for name, network in networks.items()}
        self._features = RandomFeatures()
        self.phases = [Phase("encoder", "encoder", self.encoder_terms, self.count),
                       Phase("decoder", "decoder", self.decoder_terms, self.count),
                       Phase("discriminator", "discriminator", self.discriminator_terms, self.count,
                             statistics=frozenset({"real_logit", "fake_logit"}))]

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The initial draw of a network."""
        return self._weights[name]

    def count(self, batch: Batch) -> int:
        """Images of a micro-batch."""
        return len(batch["image"])

    def encoder_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """In nats, summed over the images."""
        images = to_signed(batch["image"])
        mean, log_variance = networks["encoder"](images)
        _, seen = networks["discriminator"](networks["decoder"](_drawn(mean, log_variance, draws)))
        kl = divergence(mean, log_variance).sum()
        return {"reconstruction": _feature_nats(self._features_of(networks, images), seen), "kl": self.settings.beta * kl}

    def decoder_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """In nats, summed over the images; the judgement is of two for each."""
        images = to_signed(batch["image"])
        with torch.no_grad():
            latents = self._latents(networks, images, draws)
        logits, seen = networks["discriminator"](networks["decoder"](latents))
        nats = _feature_nats(self._features_of(networks, images), seen[: len(images)])
        return {"reconstruction": self.settings.reconstruction_weight * nats, "adversarial": F.softplus(-logits).sum()}

    def discriminator_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """Cross-entropy in nats, summed over the images; fakes are two for each."""
        images = to_signed(batch["image"])
        with torch.no_grad():
            fakes = networks["decoder"](self._latents(networks, images, draws))
        logits, _ = networks["discriminator"](torch.cat([images, fakes]))
        real, fake = logits.split([len(images), len(fakes)])
        return {"real": F.softplus(-real).sum(), "fake": F.softplus(fake).sum(),
                "real_logit": real.detach().sum(), "fake_logit": fake.detach().sum() / 2}

    def _latents(self, networks: Networks, images: Tensor, draws: Draws) -> Tensor:
        """Latents of the images, and as many from the prior, `(2 x batch, latents)`."""
        mean, log_variance = networks["encoder"](images)
        return torch.cat([_drawn(mean, log_variance, draws), draws.normal("prior", *self.latent_shape)])

    @torch.no_grad()
    def _features_of(self, networks: Networks, images: Tensor) -> Tensor:
        return networks["discriminator"](images)[1]

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """By image: `squared_error` of the reconstruction from the posterior's mean, a mean over pixels in [0, 1]; `kl`; and
        the features of the image and of a sample."""
        images = to_unit(batch["image"])
        mean, log_variance = self.encode(networks, batch["image"])
        error = (self.generate(networks, mean) - images).square().flatten(1).mean(1)
        latents = Draws(self.seed, "validation", 0, batch["sample"], images.device).normal("prior", *self.latent_shape)
        features = self._features.to(images.device)
        return {"squared_error": error, "kl": divergence(mean, log_variance).sum(1), "real_features": features(images),
                "fake_features": features(self.generate(networks, latents))}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """`loss` and `fd` (or `mmd`, see `distance`) of samples in random features; `pixel_rmse` of reconstructions in [0, 1];
        `kl` in nats."""
        rmse = totals["squared_error"].double().mean().sqrt().item()
        return {**distance(totals["real_features"], totals["fake_features"]), "pixel_rmse": rmse,
                "kl": totals["kl"].double().mean().item()}

    @torch.no_grad()
    def encode(self, networks: Networks, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the posterior, `(batch, latents)`, of uint8 images."""
        return networks["encoder"](to_signed(images))

    @torch.no_grad()
    def generate(self, networks: Networks, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images fp32 `(batch, channels, size, size)` in [0, 1] of latents `(batch, latents)`."""
        return (networks["decoder"](latents).float() + 1) / 2

    @torch.no_grad()
    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """Validation images above their reconstructions, and samples from the prior below."""
        return preview_picture(self, networks, seed, device, self._examples)


def _drawn(mean: Tensor, log_variance: Tensor, draws: Draws) -> Tensor:
    """A latent `(batch, latents)` from each posterior."""
    return mean + (0.5 * log_variance).exp() * draws.normal("epsilon", mean.shape[1])


def _feature_nats(real: Tensor, seen: Tensor) -> Tensor:
    return 0.5 * (real - seen).square().sum()


VAEGANConfig = Config[VAEGANSettings, ImageDataSettings, VAEGANObjectiveSettings]


def build_data(settings: ImageDataSettings, seed: int) -> ImageData:
    return ImageData(settings, seed)


def validation(settings: ImageDataSettings, seed: int) -> list[Sample]:
    return validation_images(settings, seed)


def build(config: VAEGANConfig, data: ImageData) -> VAEGANObjective:
    """The objective of a run. Raises UserError for an impossible model."""
    objective = _build(config, examples_of(data))
    objective.loss_unit = distance_units(len(data.validation()), RandomFeatures.width)
    return objective


def restore(config: VAEGANConfig, folder: Path) -> VAEGANObjective:
    """The objective of a trained run."""
    return _build(config, None)


def blueprint(config: VAEGANConfig) -> Blueprint:
    """What a step is planned of. Raises UserError for an impossible model."""
    shape = (config.data.channels, config.data.size, config.data.size)
    return Blueprint(_build(config, None), {"image": torch.empty(shape, dtype=torch.uint8, device="meta")})


def _build(config: VAEGANConfig, examples: Callable[[], Tensor] | None) -> VAEGANObjective:
    model, shape = config.model, (config.data.channels, config.data.size, config.data.size)
    vae, judge = networks_settings(model, shape)
    with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
        networks = {"encoder": Encoder(vae, shape[-1], shape[0]), "decoder": ImageDecoder(vae, shape[-1], shape[0]),
                    "discriminator": FeatureDiscriminator(judge, shape, model.feature_stage)}
    return VAEGANObjective(networks, config.objective, shape, latents=model.latents, seed=config.run.seed, examples=examples)
