"""Long sequences over several processes: each holds a part of every sequence, and, for attention, some heads of all of it.

Jacobs et al. 2023, "DeepSpeed Ulysses": what treats each position by itself (embeddings, norms, MLPs, the loss) needs no other
positions, and attention needs no other heads. So two exchanges a layer, each of what the process holds, are all it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor


@dataclass(frozen=True)
class SequencePart:
    """Which part of each sequence this process computes: number `index` of `of` equal ones.

    Attributes:
        group: the processes that hold the parts, in their order; None where none need be asked.
    """

    index: int = 0
    of: int = 1
    group: ProcessGroup | None = None

    def of_time(self, x: Tensor) -> Tensor:
        """This process's part of `(batch, time, ...)`, a view."""
        size = x.shape[1] // self.of
        return x[:, self.index * size:(self.index + 1) * size]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Each `(batch, heads, time / of, width)` becomes `(batch, heads / of, time, width)`, in one exchange: this process's
        part of the heads, at all positions. Collective."""
        parts = [tensor.unflatten(1, (self.of, -1)) for tensor in tensors]  # (batch, of, heads / of, time / of, width)
        heads = [part.shape[2] for part in parts]
        received = self._exchange(torch.cat(parts, dim=2).movedim(1, 0))  # by whose positions they are
        return [*received.movedim(0, 2).flatten(2, 3).split(heads, dim=1)]

    def to_time(self, x: Tensor) -> Tensor:
        """The way back: `(batch, heads / of, time, width)` becomes `(batch, heads, time / of, width)`. Collective."""
        received = self._exchange(x.unflatten(2, (self.of, -1)).movedim(2, 0))  # by whose heads they are
        return received.movedim(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Entry i of the first dimension is sent to process i of the group, and entry i of the result is from it."""
        assert self.group is not None  # whoever computes is in one
        return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, self.group))


WHOLE = SequencePart()
"""All of it, in one process."""
