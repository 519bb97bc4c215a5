"""How the weights of a whole network lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def set_memory_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the network's weights and buffers out in this order, in place."""
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's annotations of `to` leave it out
