"""How good and how varied generated samples are, from their features and those of real ones.

Every function takes feature tensors `(n, width)` from one feature network, and computes in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import UserError
from genscale.rng import numpy_generator

log = logging.getLogger("genscale")
ROWS = 512
EQUAL = 1e-12
"""Samples whose squared distance is less, relative to their lengths, are one and the same."""
NEIGHBOURS = 5


@dataclass(frozen=True)
class FeatureStatistics:
    """What a Frechet distance needs of a set of features, in sums that parts of the set add up to.

    Attributes:
        count: number of samples.
        total: float64 `(width,)`, sum of the features.
        products: float64 `(width, width)`, sum of their outer products.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features `(n, width)`."""
        features = features.double()
        return cls(len(features), features.sum(0), features.T @ features)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together."""
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """`(width,)`."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """`(width, width)`, unbiased."""
        covariance = (self.products - torch.outer(self.total, self.total) / self.count) / (self.count - 1)
        return (covariance + covariance.T) / 2


def frechet_distance(real: Tensor | FeatureStatistics, fake: Tensor | FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to both sets (Heusel et al. 2017): `fid` where, and only where,
    the features are Inception's.

    Raises:
        UserError: no more samples than features, where the covariance would be singular.
    """
    real, fake = (features if isinstance(features, FeatureStatistics) else FeatureStatistics.of(features)
                  for features in (real, fake))
    width = len(real.total)
    for name, statistics in (("real", real), ("generated", fake)):
        if statistics.count <= width:
            raise UserError(f"Frechet distance: {statistics.count} {name} samples are too few for features of width {width}, "
                            f"whose covariance they leave singular; give at least {width + 1}")
    # tr sqrt(A B) is the sum of the singular values of sqrt(A) sqrt(B): a near-zero eigenvalue's rounding error is nowhere
    # magnified by a square root, as it is by the eigenvalues of A B.
    roots = [_factor(statistics.covariance) for statistics in (real, fake)]
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (real.mean - fake.mean).square().sum() + sum(root.square().sum() for root in roots) - 2 * overlap
    return max(0.0, distance.item())


def distance_units(images: int, width: int) -> str:
    """The unit of `distance`'s loss on a validation set of so many images, and a line in the log where they are few."""
    if images > width:
        return "Frechet distance, random features"
    log.warning("data.validation_images: %d validation image(s) are too few for a Frechet distance of %d features, which takes "
                "%d: evaluations give the squared maximum mean discrepancy (validation_mmd) instead", images, width, width + 1)
    return "squared maximum mean discrepancy, random features"


def distance(real: Tensor, fake: Tensor) -> dict[str, float]:
    """`loss`, and what it is: `fd`, the Frechet distance, or of no more samples than features `mmd`, the squared maximum mean
    discrepancy. Infinite, and so never the best, where generated samples are no numbers."""
    name, measure = ("fd", frechet_distance) if len(real) > real.shape[1] else ("mmd", squared_discrepancy)
    found = measure(real, fake) if fake.isfinite().all() else math.inf
    return {"loss": found, name: found}


def _factor(covariance: Tensor) -> Tensor:
    """F with F F^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x.y / width + 1)^3 of each pair (Binkowski et al. 2018)."""
    base = a @ b.T / a.shape[1] + 1
    return base * base * base


def squared_discrepancy(real: Tensor, fake: Tensor) -> float:
    """The squared maximum mean discrepancy of the two sets themselves (the biased estimate of Gretton et al. 2012): of however
    few samples, and never below 0."""
    real, fake = real.double(), fake.double()
    return max(0.0, (_kernel(real, real).mean() + _kernel(fake, fake).mean() - 2 * _kernel(real, fake).mean()).item())


def squared_mmd(real: Tensor, fake: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, under the kernel (x.y / width + 1)^3."""
    real, fake = real.double(), fake.double()

    def within(a: Tensor) -> Tensor:
        values = _kernel(a, a)
        return (values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (within(real) + within(fake) - 2 * _kernel(real, fake).mean()).item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 0) -> tuple[float, float]:
    """The kernel distance (KID where the features are Inception's; Binkowski et al. 2018) and its standard error.

    The distance is the mean of `squared_mmd` over random subsets of `subset_size` of both sets (at most half of the smaller
    set). Subsets overlap, so the error is the delete-d jackknife's (Shao and Wu 1989), not the spread over sqrt(subsets).

    Raises:
        UserError: fewer than 4 samples of either.
    """
    smaller = min(len(real), len(fake))
    size = min(subset_size, smaller // 2)
    if size < 2:
        raise UserError(f"kernel distance: {smaller} samples are too few; give at least 4 real and 4 generated ones")
    real, fake = real.double(), fake.double()
    draw = numpy_generator(seed, "kernel distance")
    values = []
    for _ in range(subsets):
        chosen = [torch.from_numpy(draw.choice(len(features), size, replace=False)) for features in (real, fake)]
        values.append(squared_mmd(real[chosen[0].to(real.device)], fake[chosen[1].to(fake.device)]))
    estimates = torch.tensor(values, dtype=torch.float64)
    return estimates.mean().item(), math.sqrt(size / (smaller - size) * estimates.var(unbiased=False).item())


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Fidelity and variety by nearest neighbours: a sample's ball reaches to its k-th neighbour within its own set.

    precision, recall: share of the generated samples in any real ball, and the other way round (Kynkaanniemi et al. 2019).
    density: how many real balls hold a generated sample, over k, on average. coverage: share of the real balls that hold a
    generated sample (Naeem et al. 2020).

    Raises:
        UserError: no more than k samples of either.
    """
    real_radii, fake_radii = (_radii(features, k, name) for features, name in ((real, "real"), (fake, "generated")))
    in_real_balls, recalled, nearest = [], [], torch.full_like(real_radii, math.inf)
    for distances in _distances(fake, real):
        in_real_balls.append((distances <= real_radii).sum(1))
        nearest = torch.minimum(nearest, distances.amin(0))
    for distances in _distances(real, fake):
        recalled.append((distances <= fake_radii).any(1))
    balls = torch.cat(in_real_balls).double()
    return {"precision": (balls > 0).double().mean().item(), "recall": torch.cat(recalled).double().mean().item(),
            "density": (balls.mean() / k).item(), "coverage": (nearest <= real_radii).double().mean().item()}


def _radii(features: Tensor, k: int, name: str) -> Tensor:
    if len(features) <= k:
        raise UserError(f"nearest neighbours: {len(features)} {name} samples are too few for k = {k}; give at least {k + 1}")
    # The nearest is the sample itself, at distance 0.
    return torch.cat([distances.topk(k + 1, largest=False).values[:, -1] for distances in _distances(features, features)])


def nearest_distances(features: Tensor, others: Tensor) -> Tensor:
    """float64 `(n,)`: how far each sample's nearest among `others` is."""
    return torch.cat([distances.amin(1) for distances in _distances(features, others)])


def memorisation_rate(training: Tensor, held_out: Tensor, fake: Tensor, quantile: float = 0.05) -> float:
    """Share of generated samples that lie nearer to their nearest training sample than the `quantile` of held-out samples does.

    Held-out samples are new ones of the same distribution, so a generator that is as new has a rate of about `quantile`; one
    that copies has up to 1 (the comparison of Meehan et al. 2020, "A non-parametric test to detect data-copying", at one
    quantile of the distances instead of their ranks). It can be below `quantile` for samples far from anything real.
    """
    threshold = nearest_distances(held_out, training).quantile(quantile)
    return (nearest_distances(fake, training) < threshold).double().mean().item()


def diversity(real: Tensor, fake: Tensor) -> float | None:
    """Mean distance between two generated samples over that between two real ones: 0 where all are the same, about 1 where
    they vary as real ones do; None where real ones do not vary, or there is but one of either."""
    if min(len(real), len(fake)) < 2 or not (apart := _mean_distance(real)):
        return None
    return _mean_distance(fake) / apart


def _mean_distance(features: Tensor) -> float:
    total = sum(distances.sum().item() for distances in _distances(features, features))
    return total / (len(features) * (len(features) - 1))


def _distances(features: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to all of `others`, some rows at a time."""
    features, others = features.double(), others.double()
    center = others.mean(0)
    features, others = features - center, others - center
    lengths = others.square().sum(1)
    for part in features.split(ROWS):
        scale = part.square().sum(1, keepdim=True) + lengths
        squares = torch.addmm(scale, part, others.T, alpha=-2)
        squares[squares < EQUAL * scale] = 0  # rounding must not set equal samples apart
        yield squares.sqrt_()


def class_histogram(labels: Tensor, classes: int) -> list[int]:
    """How many of the predicted labels `(n,)` are of each class."""
    return torch.bincount(labels.long(), minlength=classes).tolist()


def missing_classes(histogram: Sequence[int], names: Sequence[str] | None = None) -> list[str]:
    """The classes that no sample fell in, by name or number."""
    return [names[i] if names else str(i) for i, count in enumerate(histogram) if count == 0]


def mode_count(labels: Tensor, classes: int) -> int:
    """How many classes at least one sample fell in (mode counting of Che et al. 2017 and Lin et al. 2018)."""
    return sum(count > 0 for count in class_histogram(labels, classes))
