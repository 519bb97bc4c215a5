"""The layers that flows had before `flow.Move`: runs that began with them go on with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.families.image_reward.flow import BINS, spline
from genscale.models.initial_draw import scale_initial


class Coupling(nn.Module):
    """Moves one half of a vector by what the other is, each entry along a spline (Durkan et al. 2019, "Neural spline flows").
    At first it moves nothing. Arguments as of `Move`; the halves are the first and the last entries, and the even and the odd
    ones, in turn.
    """

    def __init__(self, size: int, index: int, classes: int, width: int) -> None:
        super().__init__()
        self.index = index
        kept, moved = (len(half) for half in self._halves(torch.empty(size, 1)))
        self.moved = moved
        self.hidden = nn.ModuleList([nn.Linear(kept + classes, width), nn.Linear(width, width)])
        self.output = scale_initial(nn.Linear(width, moved * (3 * BINS - 1)), gain=0.0)

    def forward(self, vectors: Tensor, context: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """As `Move.forward`."""
        kept, moved = (half.T for half in self._halves(vectors.T))
        x = torch.cat([kept, context], 1).to(self.output.weight.dtype)
        for layer in self.hidden:
            x = F.silu(layer(x))
        moved, log_slope = spline(moved, self.output(x).float().unflatten(1, (self.moved, -1)), inverse)
        return self._joined(kept, moved), log_slope.sum(1)

    def _halves(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept and what is moved, of entries `(size, ...)`."""
        middle = len(entries) // 2
        pair = (entries[:middle], entries[middle:]) if self.index % 4 < 2 else (entries[0::2], entries[1::2])
        return pair if self.index % 2 == 0 else (pair[1], pair[0])

    def _joined(self, kept: Tensor, moved: Tensor) -> Tensor:
        """`(batch, size)`, of what `_halves` has parted."""
        first, second = (kept, moved) if self.index % 2 == 0 else (moved, kept)
        if self.index % 4 < 2:
            return torch.cat([first, second], 1)
        joined = first.new_empty(len(first), first.shape[1] + second.shape[1])
        joined[:, 0::2], joined[:, 1::2] = first, second
        return joined
