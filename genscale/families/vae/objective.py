"""The variational autoencoder (Kingma and Welling 2014): a bound on the likelihood of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.lanes import Sample
from genscale.families.vae.binarisation import binarised, content_keys
from genscale.families.vae.losses import (
    VAEObjectiveSettings,
    check_objective,
    divergence,
    importance_bound,
    log_weights,
    weighted_divergence,
)
from genscale.families.vae.network import VAE, latent_shape
from genscale.families.vae.pictures import examples_of, preview_picture, validation_images
from genscale.families.vae.settings import VAESettings
from genscale.models.initial_weights import InitialWeights
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.objectives.likelihoods import BLACK_AND_WHITE, LIKELIHOODS, Measures
from genscale.rng import Draws
from genscale.settings.config import Config

ACTIVE = 0.01
"""A latent dimension is active where the mean of its posterior varies by more over images (Burda et al. 2016)."""

DECODED_PIXELS = 2**22
"""Decoded together in an estimate of the likelihood; their feature maps take a hundred times the memory or so."""


class VAEObjective(Objective):
    """Trains one network, `vae`, on a lower bound of the likelihood of images, in nats an image.

    A batch holds `image`, uint8 `(batch, channels, size, size)`. Black and white images are drawn from grey ones by step and
    sample where objective.binarise is dynamic; where it is fixed, by the pixels themselves (`content_keys`): an image is the
    same black and white one in every epoch, on any rank and with any seed (a mirrored image is another image). The fixed set is
    therefore of the kind of Larochelle and Murray's (2011) file, not that file.

    Args:
        network: the model, made of `settings`.
        settings, objective: the `model` and `objective` sections.
        shape: `(channels, size, size)` of images.
        seed: the run's, for initial weights and for what is drawn in evaluations.
        examples: gives uint8 images to show reconstructions of, or nothing.
        black_and_white: the images have no other pixels.
    """

    unit = "images"
    averaged = ("vae",)
    loss_unit = "nats per image"
    higher_is_better = frozenset({"active_units"})
    class_names = None

    def __init__(self, network: VAE, settings: VAESettings, objective: VAEObjectiveSettings, shape: tuple[int, int, int], *,
                 seed: int, examples: Callable[[], Tensor] | None = None, black_and_white: bool = False) -> None:
        self.networks = {"vae": network}
        self.settings, self.seed, self.image_shape, self._examples = objective, seed, shape, examples
        self.latent_shape = latent_shape(settings, shape[-1])
        self.likelihood = LIKELIHOODS[settings.likelihood]
        self._weights = InitialWeights(network, seed)
        self._per_dim = self._measures(black_and_white).per_dim
        statistics = {"kl_nats", self._per_dim, "active_dimensions"}
        if objective.importance_samples > 1:
            statistics.add("reconstruction")
        self.phases = [Phase("vae", "vae", loss=self.loss, count=self.count, statistics=frozenset(statistics))]

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The initial draw."""
        return self._weights

    def count(self, batch: Batch) -> int:
        """Images of a micro-batch."""
        return len(batch["image"])

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The phase's loss in nats, summed over the images: `reconstruction` and weighted `kl`; with several importance
        samples `negative_bound`.

        Statistics, summed likewise: `kl_nats`, not weighted; `bits_per_dim` of the bound (beta 1), under another name where the
        likelihood is none of grey levels (`Measures`); `active_dimensions`, whose divergence is above 0.01 nats.
        """
        found = self._bound(networks, self.observed(batch["image"], draws), draws)
        kl = found["kl"].flatten(1)
        if self.settings.importance_samples > 1:
            terms = {"negative_bound": found["negative_bound"].sum(), "reconstruction": found["reconstruction"].detach().sum()}
        else:
            terms = {"reconstruction": found["reconstruction"].sum(),
                     "kl": weighted_divergence(kl, self.settings, draws.step).sum()}
        terms["kl_nats"] = kl.detach().sum()
        terms[self._per_dim] = self._bits(found["negative_bound"].detach()).sum()
        terms["active_dimensions"] = (kl.detach() > ACTIVE).float().sum()
        return terms

    def observed(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 images as the network sees them: fp32, black and white where so set, by the draws or (None) by content."""
        return self.likelihood.observed(self._seen(images, draws))

    def _seen(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        if self.settings.binarise == "none":
            return images
        if self.settings.binarise == "dynamic" and draws is not None:
            return binarised(images, draws.keys("binarisation"))
        return binarised(images, content_keys(images))

    def _bound(self, networks: Networks, pixels: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Each image's `negative_bound`, `reconstruction` `(batch,)`, `kl` and posterior `mean` `(batch, *latent_shape)`."""
        noise = draws.normal("epsilon", self.settings.importance_samples, *self.latent_shape)
        mean, log_variance, latents, location, log_scale = networks["vae"](pixels, noise)
        nats = self._nats(pixels, location, log_scale)
        kl = divergence(mean, log_variance)
        if self.settings.importance_samples > 1:
            bound = -importance_bound(log_weights(nats, latents, mean, log_variance))
        else:
            bound = nats[:, 0] + kl.flatten(1).sum(1)
        return {"negative_bound": bound, "reconstruction": nats.mean(1), "kl": kl, "mean": mean}

    def _nats(self, pixels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """-log p(x | z), `(batch, samples)`, of `batch x samples` decoded images."""
        if log_scale.ndim == 4:
            log_scale = log_scale.unflatten(0, (len(pixels), -1))
        nats = self.likelihood.nats(pixels[:, None], location.unflatten(0, (len(pixels), -1)), log_scale)
        return nats.flatten(2).sum(2)

    def _bits(self, nats: Tensor) -> Tensor:
        """Bits a pixel and channel of nats an image; of a density, on the scale 0 to 255."""
        return nats / (math.prod(self.image_shape) * math.log(2)) + self.likelihood.nats_to_integers / math.log(2)

    def _measures(self, black_and_white: bool) -> Measures:
        """What sums of nats are called, of images of black and white alone or of others."""
        bernoulli = self.likelihood is LIKELIHOODS["bernoulli"]
        plain = bernoulli and (black_and_white or self.settings.binarise != "none")
        return BLACK_AND_WHITE if plain else self.likelihood.measures

    def measures_of(self, images: Tensor) -> Measures:
        """What sums of nats are called, of these uint8 images."""
        return self._measures(bool(_without_grey(images).all()))

    def _fixed_draws(self, batch: Batch) -> Draws:
        return Draws(self.seed, "validation", 0, batch["sample"], batch["image"].device)

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """By image: `negative_bound` (beta 1, with the importance samples of training), its parts `reconstruction` and `kl`,
        the posterior `mean`, and whether it is `black_and_white` alone. Every draw belongs to the sample's number."""
        draws = self._fixed_draws(batch)
        found = self._bound(networks, self.observed(batch["image"], draws), draws)
        return {**found, "kl": found["kl"].flatten(1).sum(1), "mean": found["mean"].flatten(1),
                "black_and_white": _without_grey(batch["image"]).float()}

    def summarise(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """`loss` (nats an image), its parts, bits per dimension (see `loss`), and the number of active units."""
        means = {name: totals[name].double().mean() for name in ("negative_bound", "reconstruction", "kl")}
        return {"loss": means["negative_bound"].item(), "reconstruction": means["reconstruction"].item(),
                "kl": means["kl"].item(),
                self._measures(bool(totals["black_and_white"].all())).per_dim: self._bits(means["negative_bound"]).item(),
                "active_units": _active(totals["mean"])}

    @torch.no_grad()
    def encode(self, networks: Networks, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the posterior, `(batch, *latent_shape)`, of uint8 images."""
        return networks["vae"](self.observed(images))

    @torch.no_grad()
    def generate(self, networks: Networks, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The expected images, fp32 `(batch, channels, size, size)` in [0, 1], of latents `(batch, *latent_shape)`."""
        location, _ = networks["vae"](latents=latents)
        return self.likelihood.mean(location)

    @torch.no_grad()
    def log_likelihood(self, networks: Networks, batch: Batch, samples: int, *, seed: int | None = None,
                       chunk: int = 100) -> Tensor:
        """log p(x) of each image, fp64 `(batch,)` in nats, by importance sampling from the posterior (Burda et al. 2016); it is
        to be called what `measures_of` says.

        An estimate from below (in expectation) that approaches log p(x) as `samples` grows; memory does not grow with them.

        Args:
            batch: `image`, uint8, and `sample`, by which all draws are addressed (as in `evaluate`).
            samples: importance samples an image, thousands for a figure to report.
            seed: of the latents (default: the run's); the black and white images stay those of `evaluate`.
            chunk: importance samples drawn at once; another chunk draws other latents.
        """
        pixels = self.observed(batch["image"], self._fixed_draws(batch))
        mean, log_variance = networks["vae"](pixels)
        deviation = (0.5 * log_variance).exp()
        total = torch.full((len(pixels),), -math.inf, dtype=torch.float64, device=pixels.device)
        for start in range(0, samples, chunk):
            draws = Draws(self.seed if seed is None else seed, "importance", start, batch["sample"], pixels.device)
            noise = draws.normal("epsilon", min(chunk, samples - start), *self.latent_shape)
            latents = mean[:, None] + deviation[:, None] * noise
            nats = torch.cat([self._nats(pixels, *networks["vae"](latents=part.flatten(0, 1)))
                              for part in latents.split(self._decoded_at_once(len(pixels)), dim=1)], dim=1)
            weights = log_weights(nats, latents, mean, log_variance).double()
            total = torch.logaddexp(total, torch.logsumexp(weights, 1))
        return total - math.log(samples)

    def _decoded_at_once(self, images: int) -> int:
        """Importance samples of so many images that are decoded together."""
        return max(1, DECODED_PIXELS // (images * math.prod(self.image_shape)))

    def active_units(self, networks: Networks, batches: Iterable[Batch]) -> int:
        """Latent dimensions whose posterior mean varies by more than 0.01 over all images of the batches."""
        return _active(torch.cat([self.encode(networks, batch["image"])[0].flatten(1) for batch in batches]))

    @torch.no_grad()
    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """Validation images as the network sees them above their reconstructions, and samples from the prior below."""
        return preview_picture(self, networks, seed, device, self._examples, self._seen)


def _without_grey(images: Tensor) -> Tensor:
    """`(batch,)` whether a uint8 image has no pixels but black and white ones."""
    return ((images == 0) | (images == 255)).flatten(1).all(1)


def _active(means: Tensor) -> int:
    return int((means.double().var(0, correction=0) > ACTIVE).sum())


VAEConfig = Config[VAESettings, ImageDataSettings, VAEObjectiveSettings]


def build_data(settings: ImageDataSettings, seed: int) -> ImageData:
    return ImageData(settings, seed)


def validation(settings: ImageDataSettings, seed: int) -> list[Sample]:
    return validation_images(settings, seed)


def build(config: VAEConfig, data: ImageData) -> VAEObjective:
    """The objective of a run, its network initialised from the run's seed. Raises UserError for an impossible model."""
    images = (torch.from_numpy(sample["image"])[None] for sample in data.validation())
    return _build(config, examples_of(data), all(bool(_without_grey(image)) for image in images))


def restore(config: VAEConfig, folder: Path) -> VAEObjective:
    """The objective of a trained run."""
    return _build(config, None)


def blueprint(config: VAEConfig) -> Blueprint:
    """What a step is planned of. Raises UserError for an impossible model."""
    shape = (config.data.channels, config.data.size, config.data.size)
    return Blueprint(_build(config, None), {"image": torch.empty(shape, dtype=torch.uint8, device="meta")})


def _build(config: VAEConfig, examples: Callable[[], Tensor] | None, black_and_white: bool = False) -> VAEObjective:
    check_objective(config.objective, config.model.likelihood)
    shape = (config.data.channels, config.data.size, config.data.size)
    with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
        network = VAE(config.model, config.data.size, config.data.channels)
    return VAEObjective(network, config.model, config.objective, shape, seed=config.run.seed, examples=examples,
                        black_and_white=black_and_white)
