"""The latent policy: a flow from standard normal noise to latents, whose density is known exactly."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.models.initial_draw import scale_initial

MOST_LOG_SCALE = 2.0
"""A coupling layer stretches by a factor of at most e to the power of this."""
CLASS_GAIN = 10.0
"""The classes' logits by their weights: they have as far to go as all of the flow, in as many steps of the optimizer."""


class Coupling(nn.Module):
    """What the kept part of a vector says of the moved part: `(batch, kept)`, context `(batch, classes)` to shift and logarithm
    of the scale, each fp32 `(batch, moved)`. At first zeros."""

    def __init__(self, kept: int, moved: int, classes: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(kept + classes, width), nn.Linear(width, width)])
        self.output = scale_initial(nn.Linear(width, 2 * moved), gain=0.0)

    def forward(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([kept, context], 1).to(self.output.weight.dtype)
        for layer in self.hidden:
            x = F.silu(layer(x))
        shift, log_scale = self.output(x).float().chunk(2, 1)
        return shift, MOST_LOG_SCALE * torch.tanh(log_scale / MOST_LOG_SCALE)


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
    """Coupling layers that move one half of a vector after the other (Dinh et al. 2017, "Density estimation using Real NVP").
    At first the identity: latents are the noise.

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
        self.sizes, self.classes = (size // 2, size - size // 2), classes
        self.layers = nn.ModuleList(Coupling(self.sizes[i % 2], self.sizes[1 - i % 2], classes, width) for i in range(layers))
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
        context, parts = self._context(noise, labels), list(noise.split(self.sizes, 1))
        for index, layer in enumerate(self.layers):
            kept, moved = index % 2, 1 - index % 2
            shift, log_scale = layer(parts[kept], context)
            parts[moved] = parts[moved] * log_scale.exp() + shift
        return torch.cat(parts, 1), labels

    def _log_p(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        context, parts = self._context(latents, labels), list(latents.split(self.sizes, 1))
        total = latents.new_zeros(len(latents))
        for index, layer in reversed(list(enumerate(self.layers))):
            kept, moved = index % 2, 1 - index % 2
            shift, log_scale = layer(parts[kept], context)
            parts[moved] = (parts[moved] - shift) * (-log_scale).exp()
            total = total - log_scale.sum(1)
        total = total + log_normal(torch.cat(parts, 1))
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
