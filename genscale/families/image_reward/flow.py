"""The latent policy: a flow from standard normal noise to latents, whose density is known exactly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.models.initial_draw import scale_initial

BINS, REACH = 8, 4.0
"""Pieces of a spline, and how far from 0 it reaches; outside it changes nothing."""
LEAST_BIN, LEAST_SLOPE = 1e-2, 1e-2
CLASS_GAIN = 10.0
"""The classes' logits by their weights: they have as far to go as all of the flow, in as many steps of the optimizer."""


class Coupling(nn.Module):
    """What the kept part of a vector says of the moved part: `(batch, kept)`, context `(batch, classes)` to the spline of each
    entry of the moved part, fp32 `(batch, moved, 3 x BINS - 1)`. At first zeros."""

    def __init__(self, kept: int, moved: int, classes: int, width: int) -> None:
        super().__init__()
        self.moved = moved
        self.hidden = nn.ModuleList([nn.Linear(kept + classes, width), nn.Linear(width, width)])
        self.output = scale_initial(nn.Linear(width, moved * (3 * BINS - 1)), gain=0.0)

    def forward(self, kept: Tensor, context: Tensor) -> Tensor:
        x = torch.cat([kept, context], 1).to(self.output.weight.dtype)
        for layer in self.hidden:
            x = F.silu(layer(x))
        return self.output(x).float().unflatten(1, (self.moved, -1))


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
    """Coupling layers, each of which moves one half of a vector by what the other is (Dinh et al. 2017, "Density estimation
    using Real NVP"), along splines: at the edge of what is rewarded the best density falls in a step, which no affine map of
    noise does. At first the identity: latents are the noise.

    The halves are the first and the last entries, and the even and the odd ones, in turn.

    Where there are classes, it draws one of them too, by the noise's first entry, and the latent given the class.

    Args:
        size: entries of a latent; at least 2.
        layers, width: of the flow.
        classes: how many there are to choose from; 0: none.

    Example:
        >>> flow = LatentFlow(size=3, layers=2, width=8)
        >>> latents, _ = flow(torch.randn(5, 3))
        >>> flow(latents=latents).shape
        torch.Size([5])
    """

    def __init__(self, size: int, layers: int, width: int, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        halves = [[len(half) for half in _halves(torch.empty(size, 1), i)] for i in range(layers)]
        self.layers = nn.ModuleList(Coupling(kept, moved, classes, width) for kept, moved in halves)
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
        for index, layer in enumerate(self.layers):
            kept, moved = _halves(noise.T, index)
            noise = _joined(kept.T, spline(moved.T, layer(kept.T, context))[0], index)
        return noise, labels

    def _log_p(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        context, total = self._context(latents, labels), latents.new_zeros(len(latents))
        for index, layer in reversed(list(enumerate(self.layers))):
            kept, moved = _halves(latents.T, index)
            noise, log_slope = spline(moved.T, layer(kept.T, context), inverse=True)
            latents, total = _joined(kept.T, noise, index), total + log_slope.sum(1)
        total = total + log_normal(latents)
        if self.class_logits is None or labels is None:
            return total
        return total + self.class_logits().log_softmax(0)[labels]

    def _context(self, like: Tensor, labels: Tensor | None) -> Tensor:
        return like.new_zeros(len(like), 0) if labels is None else F.one_hot(labels, self.classes).to(like.dtype)


def _halves(entries: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What a layer keeps and what it moves, of entries `(size, ...)`."""
    middle = len(entries) // 2
    pair = (entries[:middle], entries[middle:]) if layer % 4 < 2 else (entries[0::2], entries[1::2])
    return pair if layer % 2 == 0 else (pair[1], pair[0])


def _joined(kept: Tensor, moved: Tensor, layer: int) -> Tensor:
    """`(batch, size)`, of what `_halves` has parted."""
    first, second = (kept, moved) if layer % 2 == 0 else (moved, kept)
    if layer % 4 < 2:
        return torch.cat([first, second], 1)
    joined = first.new_empty(len(first), first.shape[1] + second.shape[1])
    joined[:, 0::2], joined[:, 1::2] = first, second
    return joined


def log_normal(latents: Tensor) -> Tensor:
    """log p of vectors `(batch, size)` under the standard normal distribution, `(batch,)`."""
    return -0.5 * (latents.square() + math.log(2 * math.pi)).sum(1)


def drawn_class(noise: Tensor, logits: Tensor) -> Tensor:
    """Classes int64 `(batch,)` of probabilities by these logits, by standard normal noise `(batch,)`: where its own cumulative
    probability falls."""
    uniform = 0.5 * torch.erfc(-noise.double() / math.sqrt(2))
    cumulative = logits.double().softmax(0).cumsum(0)
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(logits) - 1)
