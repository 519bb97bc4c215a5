"""What a decoder's output says of pixels: likelihoods of an image given its latent, in nats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.models.image_layers import to_signed, to_unit

GAUSSIAN_FLOOR = -5.54  # log(1/255), half a grey level: a density of constant pixels would have no maximum
LOGISTIC_FLOOR = -7.0  # as in PixelCNN++
HALF_BIN = 1 / 255  # of pixels in [-1, 1]


class Measures(NamedTuple):
    """What sums of nats are called.

    Attributes:
        of_image: of an image; `sign` x minus the nats.
        per_dim: in bits, of a pixel and channel.
    """

    of_image: str
    per_dim: str
    sign: int = 1


class Likelihood(ABC):
    """The likelihood of pixels that are independent given the latent.

    Attributes:
        floor: of the logarithm of the scale.
        nats_to_integers: nats to add, for each pixel and channel, that make a density one on the scale 0 to 255 (bins of 1).
    """

    floor: float = 0.0
    nats_to_integers: float = 0.0

    measures = Measures("log_likelihood", "bits_per_dim")
    """What is measured of grey levels."""

    @abstractmethod
    def observed(self, images: Tensor) -> Tensor:
        """uint8 images as the fp32 pixels that the likelihood is one of, which the encoder sees too."""

    @abstractmethod
    def nats(self, pixels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Minus log p(pixels | location, scale) of each pixel; the three broadcast against each other."""

    @abstractmethod
    def drawn(self, uniforms: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Pixels by their quantiles, uniform on [0, 1) in steps of 2**-24; the three broadcast against each other."""

    def shown(self, pixels: Tensor) -> Tensor:
        """Pixels as an image in [0, 1]."""
        return ((pixels + 1) / 2).clamp(0, 1)

    def mean(self, location: Tensor) -> Tensor:
        """The expected image, in [0, 1]."""
        return self.shown(location)


class Bernoulli(Likelihood):
    """The location is a logit. Intensities between black and white count as probabilities: a cross-entropy, then, and no
    likelihood of anything. Of black and white alone it is one."""

    measures = Measures("cross_entropy", "cross_entropy_per_dim", sign=-1)

    def observed(self, images: Tensor) -> Tensor:
        return to_unit(images)

    def nats(self, pixels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        # max(l, 0) - l x + log(1 + exp(-|l|))
        return F.softplus(location) - location * pixels

    def drawn(self, uniforms: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return (uniforms < location.sigmoid()).float()

    def shown(self, pixels: Tensor) -> Tensor:
        return pixels

    def mean(self, location: Tensor) -> Tensor:
        return location.sigmoid()


class Gaussian(Likelihood):
    """A density of pixels in [-1, 1]; the scale is the standard deviation, half a grey level at least. The pixels are whole
    grey levels, so that it is no probability of them and its logarithm no length of a code (Theis et al. 2016)."""

    measures = Measures("log_likelihood", "neg_log2_density_per_dim")
    floor = GAUSSIAN_FLOOR
    nats_to_integers = 4.848116402675055  # log(127.5)

    def observed(self, images: Tensor) -> Tensor:
        return to_signed(images)

    def nats(self, pixels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return 0.5 * ((pixels - location) * (-log_scale).exp()).square() + (log_scale + 0.9189385332046727)  # log(2 pi) / 2

    def drawn(self, uniforms: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return location + log_scale.exp() * torch.special.ndtri(_inside(uniforms)).float()


class DiscretisedLogistic(Likelihood):
    """The probability of each of 256 values under a logistic distribution, cut at half bins, the first and last bin open to
    the outside (Salimans et al. 2017, PixelCNN++)."""

    floor = LOGISTIC_FLOOR

    def observed(self, images: Tensor) -> Tensor:
        return to_signed(images)

    def nats(self, pixels: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        inverse, centred = (-log_scale).exp(), pixels - location
        above, below = (centred + HALF_BIN) * inverse, (centred - HALF_BIN) * inverse
        # sigmoid(above) - sigmoid(below) = sigmoid(above) sigmoid(-below) (1 - exp(below - above)): no difference of
        # nearly equal numbers. An edge bin keeps one of the factors.
        first, last = pixels < HALF_BIN - 1, pixels > 1 - HALF_BIN
        width = (-torch.expm1(-2 * HALF_BIN * inverse)).log()
        zero = torch.zeros((), dtype=location.dtype, device=location.device)
        return (torch.where(last, zero, F.softplus(-above)) + torch.where(first, zero, F.softplus(below))
                - torch.where(first | last, zero, width))

    def drawn(self, uniforms: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        values = location + log_scale.exp() * torch.logit(_inside(uniforms)).float()
        return to_signed(((values + 1) * 127.5).round().clamp(0, 255).byte())


def _inside(uniforms: Tensor) -> Tensor:
    """fp64, in the middle of their steps: neither 0 nor 1, whose quantiles are infinite."""
    return uniforms.double() + 2.0**-25


BLACK_AND_WHITE = Likelihood.measures
"""What sums of nats of the Bernoulli distribution are called where all pixels are black or white."""
LIKELIHOODS: dict[str, Likelihood] = {"bernoulli": Bernoulli(), "gaussian": Gaussian(), "logistic": DiscretisedLogistic()}
