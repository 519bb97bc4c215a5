"""Running statistics and singular vectors follow every training forward; where the update is left out, they go back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptBuffers:
    """Copies of a network's small buffers, as they were at the last `keep`."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = list(buffers)
        self.copies = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        if self.buffers:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.buffers)

    def put_back(self, wanted: bool | Tensor) -> None:
        """Set the buffers to the copies, where it is wanted (as a scalar on the device it is not read)."""
        if wanted is False or not self.buffers:
            return
        with torch.no_grad():
            torch._foreach_copy_(self.buffers, self._chosen(wanted) if isinstance(wanted, Tensor) else self.copies)

    def _chosen(self, wanted: Tensor) -> list[Tensor]:
        """The copies or the buffers, of each dtype together: by a factor of 0 no buffer that holds no number would go."""
        chosen: dict[int, Tensor] = {}
        for dtype in {buffer.dtype for buffer in self.buffers}:
            places = [place for place, buffer in enumerate(self.buffers) if buffer.dtype == dtype]
            copies, buffers = (torch.cat([each[place].flatten() for place in places]) for each in (self.copies, self.buffers))
            sizes = [self.buffers[place].numel() for place in places]
            parts = torch.where(wanted, copies, buffers).split(sizes)
            chosen |= {place: part.view(self.buffers[place].shape) for place, part in zip(places, parts, strict=True)}
        return [chosen[place] for place in range(len(self.buffers))]
