"""Recomputed and compiled blocks, against plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from genscale.models.batch_norm import BatchNorm
from genscale.parallel.activation_checkpointing import checkpoint_activations


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), BatchNorm(3), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def trained(network: nn.Sequential, updates: int = 3) -> dict[str, Tensor]:
    """Weights and running statistics after a few updates; the last forward is of frozen weights, as an opponent's."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        network(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    for layer in network.modules():
        layer.is_trained = False
    network(torch.randn(4, 3, 8, 8, generator=generator))
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_running_statistics_follow_each_batch_once(mode, compiled):
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    other = copy.deepcopy(plain)
    checkpoint_activations(list(other), mode, compiled)
    expected, found = trained(plain), trained(other)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
