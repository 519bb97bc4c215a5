"""Generative adversarial networks (Goodfellow et al. 2014): a discriminator's phase, a generator's, and lazy regularisers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genscale.models.batch_norm import BatchNorm
from genscale.models.initial_weights import InitialWeights
from genscale.objectives.augmentation import augment
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.objectives.gan_losses import discriminator_loss, generator_loss, gradient_penalty, zero_centred_penalty
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.rng import Draws

INITIAL_STD = 0.02
"""Standard deviation of all initial weights (Radford et al. 2015)."""


class GAN(Objective):
    """Trains `discriminator` and `generator` against each other. Subclasses say what is generated.

    Where samples are packs, reals are `(batch, pack, ...)` and the discriminator sees the images of a pack side by side in its
    channels.

    Args:
        generator: latents `(batch, latent)`, labels -> `(batch, *shape)`.
        discriminator: `(batch, pack x channels, ...)`, labels -> logits `(batch,)`.
        settings: losses.
        seed: the run's.
        latent: width of the latents.
        pack: images in a sample.
        conditional: the batch's labels go to both networks; not with packs, whose images have different ones.
    """

    averaged = ("generator",)

    def __init__(self, generator: nn.Module, discriminator: nn.Module, settings: GANObjectiveSettings, *, seed: int,
                 latent: int, pack: int = 1, conditional: bool = False, initial_std: float | None = INITIAL_STD) -> None:
        self.networks = {"discriminator": discriminator, "generator": generator}
        self.settings, self.seed, self.pack, self.conditional = settings, seed, pack, conditional
        self.latent_shape: tuple[int, ...] = (latent,)
        self.units_per_sample = pack
        self._weights = {name: InitialWeights(network, seed, initial_std) for name, network in self.networks.items()}
        batch_norms = {name: any(isinstance(module, BatchNorm) for module in network.modules())
                       for name, network in self.networks.items()}
        self.couples_samples = any(batch_norms.values())
        # With batch normalisation reals and fakes are normalised apart, as in Radford et al. 2015.
        self._apart = batch_norms["discriminator"]
        self.phases = self._phases()

    def _phases(self) -> list[Phase]:
        settings = self.settings
        phases = [Phase("discriminator", "discriminator", self.discriminator_terms, self.count,
                        repeats=settings.discriminator_steps, second_order=settings.gradient_penalty > 0,
                        statistics=frozenset({"real_logit", "fake_logit"})),
                  Phase("generator", "generator", self.generator_terms, self.count)]
        if settings.r1 or settings.r2:
            phases.append(Phase("regularisation", "discriminator", self.regularisation_terms, self.count,
                                every=settings.regularise_every, second_order=True))
        return phases

    @abstractmethod
    def reals(self, batch: Batch) -> Tensor:
        """What the generator is to imitate, as it would generate it, `(batch, *shape)`, or `(batch, pack, *shape)`."""

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The initial draw of a network."""
        return self._weights[name]

    def count(self, batch: Batch) -> int:
        """Samples of a micro-batch."""
        return len(batch["sample"])

    def labels(self, batch: Batch) -> Tensor | None:
        """Classes to condition on, int64 `(batch,)`."""
        return batch["label"].long() if self.conditional else None

    def discriminator_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The discriminator's loss on reals and fakes, and the gradient penalty."""
        labels, reals = self.labels(batch), self._merged(self.reals(batch))
        with torch.no_grad():
            fakes = self._fakes(networks, draws, labels)
        reals, fakes = self._seen(reals, draws, "real"), self._seen(fakes, draws, "fake")
        real, fake = (logits.float() for logits in self._judge(networks["discriminator"], reals, fakes, labels))
        terms = {"adversarial": discriminator_loss(self.settings.loss, real, fake)}
        if self.settings.gradient_penalty:
            share = draws.uniform("interpolation").to(reals)
            penalty = gradient_penalty(lambda x: networks["discriminator"](x, labels), reals, fakes, share)
            terms["gradient_penalty"] = self.settings.gradient_penalty * penalty
        return {**terms, "real_logit": real.detach().sum(), "fake_logit": fake.detach().sum()}

    def generator_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The generator's loss by the frozen discriminator."""
        labels = self.labels(batch)
        fakes = self._seen(self._fakes(networks, draws, labels), draws, "fake")
        real = None
        fake = networks["discriminator"](fakes, labels)
        if self.settings.loss == "relativistic":
            with torch.no_grad():
                real = networks["discriminator"](self._seen(self._merged(self.reals(batch)), draws, "real"), labels)
        return {"adversarial": generator_loss(self.settings.loss, fake, real)}

    def regularisation_terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """R1 on reals and R2 on fakes, times the steps that they stand for."""
        labels, terms = self.labels(batch), {}
        times = self.settings.regularise_every

        def judge(x: Tensor) -> Tensor:
            return networks["discriminator"](x, labels)

        if self.settings.r1:
            reals = self._seen(self._merged(self.reals(batch)), draws, "real")
            terms["r1"] = times * self.settings.r1 * zero_centred_penalty(judge, reals)
        if self.settings.r2:
            with torch.no_grad():
                fakes = self._seen(self._fakes(networks, draws, labels), draws, "fake")
            terms["r2"] = times * self.settings.r2 * zero_centred_penalty(judge, fakes)
        return terms

    def _judge(self, discriminator: nn.Module, reals: Tensor, fakes: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._apart:
            return discriminator(reals, labels), discriminator(fakes, labels)
        both = discriminator(torch.cat([reals, fakes]), None if labels is None else labels.repeat(2))
        return both.chunk(2)

    def _fakes(self, networks: Networks, draws: Draws, labels: Tensor | None) -> Tensor:
        """`(batch, pack x channels, ...)`: one for each sample of the batch, of its class."""
        latents = draws.normal("noise", self.pack, *self.latent_shape).flatten(0, 1)
        fakes = networks["generator"](latents, labels).float()
        return self._merged(fakes.unflatten(0, (-1, self.pack)) if self.pack > 1 else fakes)

    def _merged(self, images: Tensor) -> Tensor:
        """A pack's images side by side in the channels."""
        return images.flatten(1, 2) if self.pack > 1 else images

    def _seen(self, images: Tensor, draws: Draws, stream: str) -> Tensor:
        if not self.settings.augmentation:
            return images
        apart = images.unflatten(1, (self.pack, -1)).flatten(0, 1)
        return augment(apart, self.settings.augmentation, draws, stream).unflatten(0, (-1, self.pack)).flatten(1, 2)

    def latents(self, scope: str, samples: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal latents `(samples, *latent_shape)` by number: the same in every run of this seed."""
        return Draws(self.seed, scope, 0, samples, device).normal("noise", *self.latent_shape)
