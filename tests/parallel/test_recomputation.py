"""Recomputed and compiled blocks, against plain ones."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from genscale.families.gpt.network import GPT, GPTSettings
from genscale.models.batch_norm import BatchNorm
from genscale.models.moving_state import moving_layers
from genscale.models.spectral_norm import spectral_norm
from genscale.parallel.activation_checkpointing import checkpoint_activations


class Block(nn.Module):
    def __init__(self, spectral: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), BatchNorm(3), nn.SiLU())
        if spectral:
            spectral_norm(self.layers[0])
            for buffer in (self.layers[0].parametrizations.weight[0].u, self.layers[0].parametrizations.weight[0].v):
                nn.init.normal_(buffer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def trained(network: nn.Sequential, updates: int = 3) -> dict[str, Tensor]:
    """Weights and running statistics after a few updates; the last forward is of frozen weights, as an opponent's."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        for layer in moving_layers(network):
            layer.begin_update()
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
@pytest.mark.parametrize("spectral", [False, True])
def test_running_statistics_follow_each_batch_once(spectral, mode, compiled):
    """And singular vectors."""
    torch._dynamo.reset()  # a function that has too many graphs is left as it is
    torch.manual_seed(0)
    plain = nn.Sequential(Block(spectral), Block(spectral))
    other = copy.deepcopy(plain)
    checkpoint_activations(list(other), mode, compiled)
    expected, found = trained(plain), trained(other)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_two_forwards_before_one_backward_recompute_what_they_did_in_bf16():
    """Autocast would give the second forward the weights that it has cast for the first."""
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    other = copy.deepcopy(plain)
    checkpoint_activations(list(other), "selective")
    for network, caches in ((plain, False), (other, True)):
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=caches):
            sum(network(torch.randn(4, 3, 8, 8, generator=generator)).float().square().mean() for _ in range(2)).backward()
            assert torch.is_autocast_cache_enabled() == caches
    for expected, found in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


@pytest.mark.parametrize("offload", [False, True])
def test_inputs_of_blocks_are_given_up_for_their_copies_in_host_memory(offload):
    network = GPT(GPTSettings(preset="llama", layers=3, heads=2, width=16, positions=32), vocab_size=61)
    network.initialise(0)
    plain, alive = copy.deepcopy(network), []
    checkpoint_activations(network.blocks(), "full", offload=offload)
    for block in network.blocks():
        block.register_forward_pre_hook(lambda _block, given: alive.append(weakref.ref(given[0].untyped_storage())))
    tokens = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(4))
    losses = [each(tokens[:, :-1], targets=tokens[:, 1:], dropout_keys=torch.arange(2)) for each in (network, plain)]
    gc.collect()
    assert [each() is not None for each in alive] == [not offload] * 3
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)
