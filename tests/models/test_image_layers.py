"""Spectral norm against the singular values, and initial weights as a function of seed and name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genscale.models.image_layers import BatchNorm, InitialWeights, norm_layer, spectral_norm, to_signed, to_unit
from genscale.models.initial_draw import scale_initial


def filled(network: nn.Module, seed: int = 0, std: float | None = None) -> nn.Module:
    read = InitialWeights(network, seed, std)
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            tensor.copy_(read(name))
    return network


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 8, 3), lambda: nn.Linear(20, 12), lambda: nn.Embedding(10, 6)])
def test_the_largest_singular_value_becomes_one(layer):
    made = filled(spectral_norm(layer()))
    for _ in range(30):  # the iteration converges over the updates
        made.parametrizations.weight[0].begin_update()
        largest = torch.linalg.svdvals(made.weight.detach().flatten(1))[0].item()
    assert largest == pytest.approx(1, abs=2e-3)


def test_one_iteration_an_update_however_many_forwards():
    layer = filled(spectral_norm(nn.Linear(6, 5)))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)))
    norm = layer.parametrizations.weight[0]
    start = norm.u.clone()
    x = torch.ones(2, 6)
    layer(x)
    assert torch.equal(norm.u, start), "no update was begun"
    norm.begin_update()
    first = layer(x)
    assert not torch.equal(norm.u, start)
    after = norm.u.clone()
    assert torch.equal(layer(x), first) and torch.equal(norm.u, after)
    layer.eval()
    norm.begin_update()
    layer(x)
    assert torch.equal(norm.u, after), "sampling must not change a network"


def test_the_gradient_is_that_of_the_divided_weight():
    layer = filled(spectral_norm(nn.Linear(6, 5, bias=False)))
    original, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    layer(torch.eye(6)).square().sum().backward()
    weight = original.detach().clone().requires_grad_()
    (weight / (norm.u @ weight @ norm.v)).square().sum().backward()
    torch.testing.assert_close(original.grad, weight.grad)


def test_initial_weights_depend_on_seed_and_name_alone():
    def network() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), norm_layer("batch", 32), spectral_norm(nn.Conv2d(32, 64, 3)))

    with torch.device("meta"):
        unborn = network()
    read, same, other = (InitialWeights(unborn, seed, 0.02) for seed in (0, 0, 1))
    drawn = {name: read(name) for name in unborn.state_dict()}
    for name in reversed(drawn):
        assert torch.equal(same(name), drawn[name])
    assert not torch.equal(other("0.weight"), drawn["0.weight"])
    assert drawn["0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["1.weight"].mean().item() == pytest.approx(1, abs=0.02) and drawn["1.weight"].std() > 0
    assert drawn["1.bias"].count_nonzero() == drawn["1.running_mean"].count_nonzero() == 0
    assert torch.equal(drawn["1.running_var"], torch.ones(32))
    made = filled(network(), 0, 0.02)
    assert torch.linalg.svdvals(made[2].weight.detach().flatten(1))[0].item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("layer", [nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.Linear(64, 64)])
def test_without_a_deviation_a_layer_keeps_the_variance(layer):
    filled(layer)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) if isinstance(layer, nn.Linear) \
        else torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert layer(x).std().item() == pytest.approx(1, abs=0.15)
    scale_initial(layer, gain=0.0)
    assert filled(layer)(x).count_nonzero() == 0


def test_images_are_brought_to_their_ranges():
    images = torch.tensor([0, 255], dtype=torch.uint8)
    assert to_signed(images).tolist() == [-1, 1] and to_unit(images).tolist() == [0, 1]


def test_norms_by_name():
    assert isinstance(norm_layer("batch", 8), BatchNorm) and isinstance(norm_layer("none", 8), nn.Identity)
    assert [norm_layer("group", channels).num_groups for channels in (4, 33, 48, 256, 1024)] == [1, 1, 3, 16, 32]
