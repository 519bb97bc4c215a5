"""The latent policy: a flow from standard normal noise to latents, whose density is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.models.initial_draw import scale_initial

BINS, REACH = 8, 4.0
"""Pieces of a spline, and how far from 0 it reaches; outside it changes nothing."""
LEAST_BIN, LEAST_SLOPE = 1e-2, 1e-2
CLASS_GAIN = 10.0
"""The classes' logits by their weights: they have as far to go as all of the flow, in as many steps of the optimizer."""


class Direction(nn.Module):
    """A direction that is learned, a unit vector fp32 `(size,)`; at first that of one entry."""

    def __init__(self, size: int, entry: int) -> None:
        super().__init__()
        self.entry, self.weight = entry, nn.Parameter(torch.empty(size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.weight[self.entry] = 1.0

    def forward(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=0)


class Move(nn.Module):
    """Moves vectors along one direction, as far as a spline says whose shape hangs on all the rest of the vector. At first it
    moves nothing.

    Args:
        size: entries of a vector.
        index: of the layer; at first it moves them along the entry of that number, counted round.
        classes: entries of the context.
        width: of the two hidden layers.
    """

    def __init__(self, size: int, index: int, classes: int, width: int) -> None:
        super().__init__()
        self.direction = Direction(size, index % size)
        self.hidden = nn.ModuleList([nn.Linear(size + classes, width), nn.Linear(width, width)])
        self.output = scale_initial(nn.Linear(width, 3 * BINS - 1), gain=0.0)

    def forward(self, vectors: Tensor, context: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """`(batch, size)` moved, or moved back, and the logarithm of by how much a volume grew, `(batch,)`; context `(batch,
        classes)`."""
        direction = self.direction()
        place = (vectors * direction).sum(1)  # no matrix product: autocast would make one of bf16
        rest = vectors - place[:, None] * direction
        x = torch.cat([rest, context], 1).to(self.output.weight.dtype)
        for layer in self.hidden:
            x = F.silu(layer(x))
        moved, log_slope = spline(place, self.output(x).float(), inverse)
        return rest + moved[:, None] * direction, log_slope


def spline(x: Tensor, shape: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic splines (Durkan et al. 2019, "Neural spline flows"), or their inverses: values, and the
    logarithm of the slope there, each like `x`.

    Args:
        x: of any shape.
        shape: `(*x.shape, 3 x BINS - 1)`, widths and heights of the pieces and slopes between them, unbounded; zeros make the
            identity.
    """
    widths, heights, slopes = shape.split([BINS, BINS, BINS - 1], -1)
    xs, ys = _knots(widths), _knots(heights)
    slopes = F.pad(LEAST_SLOPE + F.softplus(slopes + math.log(math.expm1(1 - LEAST_SLOPE))), (1, 1), value=1.0)
    inside = x.clamp(-REACH, REACH)
    piece = torch.searchsorted((ys if inverse else xs)[..., 1:-1].contiguous(), inside[..., None])
    left, width = _at(xs, piece), _at(xs.diff(), piece)
    low, height = _at(ys, piece), _at(ys.diff(), piece)
    first, last = _at(slopes, piece), _at(slopes, piece + 1)
    mean, bend = height / width, first + last - 2 * height / width
    if inverse:
        up = inside - low
        a = height * (mean - first) + up * bend
        b = height * first - up * bend
        c = -mean * up
        share = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
    else:
        share = (inside - left) / width
    between = share * (1 - share)
    bottom = mean + bend * between
    slope = mean.square() * (last * share.square() + 2 * mean * between + first * (1 - share).square()) / bottom.square()
    value = left + share * width if inverse else low + height * (mean * share.square() + first * between) / bottom
    log_slope = -slope.log() if inverse else slope.log()
    is_inside = x.abs() < REACH
    return torch.where(is_inside, value, x), torch.where(is_inside, log_slope, torch.zeros_like(x))


def _knots(sizes: Tensor) -> Tensor:
    """From -REACH to REACH, of pieces of these sizes by their logits: `(..., BINS)` to `(..., BINS + 1)`."""
    sizes = LEAST_BIN + (1 - BINS * LEAST_BIN) * sizes.softmax(-1)
    inner = 2 * REACH * sizes.cumsum(-1)[..., :-1] - REACH
    return F.pad(F.pad(inner, (1, 0), value=-REACH), (0, 1), value=REACH)


def _at(values: Tensor, piece: Tensor) -> Tensor:
    return values.gather(-1, piece)[..., 0]


class ClassLogits(nn.Module):
    """Logits of the classes, fp32 `(classes,)`. A module, so that whoever shards parameters knows when they are needed."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        return CLASS_GAIN * self.weight.float()


class LatentFlow(nn.Module):
    """Layers, each of which moves a vector along one direction by what all the rest of it is, as a Gibbs sampler does: a spline
    is exact along its direction, where the best density falls in a step at the edge of what is rewarded, and its volume is
    its slope. At first the identity: latents are the noise.

    Layers that move one half of a vector by the other (Dinh et al. 2017, "Density estimation using Real NVP"; Durkan et al.
    2019, "Neural spline flows") cost more and see less: what is rewarded is no matter of halves.

    Where there are classes, it draws one of them too, by the noise's first entry, and the latent given the class.

    Args:
        size: entries of a latent.
        layers, width: of the flow.
        classes: how many there are to choose from; 0: none.
        layer: makes one, as `Move` does.

    Example:
        >>> flow = LatentFlow(size=3, layers=2, width=8)
        >>> latents, _ = flow(torch.randn(5, 3))
        >>> flow(latents=latents).shape
        torch.Size([5])
    """

    def __init__(self, size: int, layers: int, width: int, classes: int = 0,
                 layer: Callable[[int, int, int, int], nn.Module] = Move) -> None:
        super().__init__()
        self.classes = classes
        self.layers = nn.ModuleList(layer(size, index, classes, width) for index in range(layers))
        self.class_logits = ClassLogits(classes) if classes else None

    def forward(self, noise: Tensor | None = None, latents: Tensor | None = None,
                labels: Tensor | None = None) -> tuple[Tensor, Tensor | None] | Tensor:
        """Draw, or measure.

        Args:
            noise: standard normal `(batch, size)`, or where there are classes `(batch, 1 + size)`.
            latents: `(batch, size)`.
            labels: classes of the latents, int64 `(batch,)`.

        Returns:
            latents and classes of the noise; or log p of latents (and classes), fp32 `(batch,)`.
        """
        if noise is not None:
            return self._drawn(noise.float())
        assert latents is not None
        return self._log_p(latents.float(), labels)

    def _drawn(self, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = None
        if self.class_logits is not None:
            labels, noise = drawn_class(noise[:, 0], self.class_logits()), noise[:, 1:]
        context = self._context(noise, labels)
        for layer in self.layers:
            noise, _ = layer(noise, context)
        return noise, labels

    def _log_p(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        context, total = self._context(latents, labels), latents.new_zeros(len(latents))
        for layer in reversed(self.layers):
            latents, log_slope = layer(latents, context, inverse=True)
            total = total + log_slope
        total = total + log_normal(latents)
        if self.class_logits is None or labels is None:
            return total
        return total + self.class_logits().log_softmax(0)[labels]

    def _context(self, like: Tensor, labels: Tensor | None) -> Tensor:
        return like.new_zeros(len(like), 0) if labels is None else F.one_hot(labels, self.classes).to(like.dtype)


def log_normal(latents: Tensor) -> Tensor:
    """log p of vectors `(batch, size)` under the standard normal distribution, `(batch,)`."""
    return -0.5 * (latents.square() + math.log(2 * math.pi)).sum(1)


def drawn_class(noise: Tensor, logits: Tensor) -> Tensor:
    """Classes int64 `(batch,)` of probabilities by these logits, by standard normal noise `(batch,)`: where its own cumulative
    probability falls."""
    uniform = 0.5 * torch.erfc(-noise.double() / math.sqrt(2))
    cumulative = logits.double().softmax(0).cumsum(0)
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(logits) - 1)
