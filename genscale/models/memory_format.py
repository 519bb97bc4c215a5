"""How the weights of a whole network lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def set_memory_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the network's weights and buffers out in this order, in place."""
    images = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.ndim in (4, 5)]
    if all(tensor.is_contiguous(memory_format=memory_format) for tensor in images):  # torch takes no other tensors for images
        return
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's annotations of `to` leave it out
