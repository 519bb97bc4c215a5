"""Running statistics and singular vectors follow every training forward; where the update is left out, they go back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptBuffers:
    """Copies of a network's small buffers, as they were at the last `keep`. Those of a type lie in one piece: a GPU is given a
    few operations for all of them."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._alike = [[buffer for buffer in buffers if buffer.dtype == dtype]
                       for dtype in dict.fromkeys(buffer.dtype for buffer in buffers)]
        self._copies = [_joined(alike) for alike in self._alike]

    def keep(self) -> None:
        with torch.no_grad():
            for alike, copy in zip(self._alike, self._copies, strict=True):
                torch._foreach_copy_(_parted(copy, alike), alike)

    def put_back(self, wanted: bool | Tensor) -> None:
        """Set the buffers to the copies, where it is wanted (as a scalar on the device it is not read)."""
        if wanted is False:
            return
        with torch.no_grad():
            for alike, copy in zip(self._alike, self._copies, strict=True):
                values = torch.where(wanted, copy, _joined(alike)) if isinstance(wanted, Tensor) else copy
                torch._foreach_copy_(alike, _parted(values, alike))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _parted(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = joined.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
