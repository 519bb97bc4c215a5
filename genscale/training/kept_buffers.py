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
            for buffer, copy in zip(self.buffers, self.copies, strict=True):
                buffer.copy_(torch.where(wanted, copy, buffer) if isinstance(wanted, Tensor) else copy)
