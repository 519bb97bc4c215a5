"""The VAE's networks: shapes, modes, what they start from, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from genscale.errors import UserError
from genscale.families.vae.network import VAE, VAESettings, latent_shape
from genscale.families.vae.settings import resolved
from genscale.models.image_layers import InitialWeights

CASES = {
    "vector": (VAESettings(width=4, multipliers=[1, 2], latents=5), 16, 3),
    "spatial": (VAESettings(width=4, multipliers=[1, 2, 2], blocks=2, attention=[4], norm="none", latent="spatial", latents=2,
                            scale="learned"), 16, 1),
    "odd": (VAESettings(width=4, latents=3, likelihood="gaussian", scale="fixed"), 12, 1),
    "mlp": (VAESettings(architecture="mlp", hidden_width=7, latents=3, likelihood="bernoulli"), 8, 1),
}


def filled(network: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """A network from the meta device with its initial weights."""
    read = InitialWeights(network, seed)
    network.to_empty(device="cpu")
    network.load_state_dict({name: read(name) for name in network.state_dict()})
    return network


def make(name: str) -> VAE:
    settings, size, channels = CASES[name]
    with torch.device("meta"):
        network = VAE(settings, size, channels)
    return filled(network)


@pytest.fixture(params=CASES)
def case(request) -> tuple[VAE, VAESettings, int, int]:
    return make(request.param), *CASES[request.param]


def test_the_modes_are_parts_of_one_function(case):
    network, settings, size, channels = case
    shape = latent_shape(settings, size)
    images, noise = torch.rand(2, channels, size, size), torch.randn(2, 3, *shape)
    mean, log_variance, latents, location, log_scale = network(images, noise)
    assert [tuple(t.shape) for t in (mean, log_variance, latents)] == [(2, *shape), (2, *shape), (2, 3, *shape)]
    assert location.shape == (6, channels, size, size)
    torch.testing.assert_close(latents, mean[:, None] + (log_variance / 2).exp()[:, None] * noise)
    assert all(torch.equal(a, b) for a, b in zip(network(images), (mean, log_variance), strict=True))
    alone = network(latents=latents[1, 2][None])
    torch.testing.assert_close(alone[0][0], location[5])  # samples of an image stand together
    assert log_scale.expand_as(location).shape == location.shape
    assert all(t.dtype == torch.float32 for t in (mean, log_variance, latents, location, log_scale))
    loss = sum(t.square().sum() for t in (mean, log_variance, location, log_scale))
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_an_image_is_decoded_by_itself(case):
    network, settings, size, _ = case
    latents = torch.randn(3, *latent_shape(settings, size))
    together, alone = network(latents=latents)[0], network(latents=latents[2:])[0]
    torch.testing.assert_close(together[2:], alone)


def test_blocks_begin_as_the_identity_so_that_depth_costs_no_signal():
    deep = VAESettings(width=4, multipliers=[1], blocks=12, attention=[8], latents=3)
    with torch.device("meta"):
        network = VAE(deep, 8, 1)
    x = torch.randn(2, 4, 8, 8)
    for block in filled(network).blocks():
        assert torch.equal(block(x), x)
    assert len(network.blocks()) == 24


def test_the_paper_network_has_its_parameters():
    with torch.device("meta"):
        network = VAE(VAESettings(architecture="mlp", latents=50, likelihood="bernoulli"), 28, 1)
    layers = [(784, 200), (200, 200), (200, 100), (50, 200), (200, 200), (200, 784)]
    assert sum(p.numel() for p in network.parameters()) == sum(a * b + b for a, b in layers)


def test_a_spatial_latent_sees_its_own_place():
    """Without norm and attention, what is far away in the latent does not reach a pixel."""
    with torch.device("meta"):
        network = VAE(VAESettings(width=4, multipliers=[1, 1], norm="none", latent="spatial", latents=2), 32, 1)
    filled(network)
    latents = torch.randn(1, 2, 16, 16)
    changed = latents.clone()
    changed[..., -1, -1] += 1
    before, after = network(latents=latents)[0], network(latents=changed)[0]
    assert torch.equal(before[..., :16, :16], after[..., :16, :16]) and not torch.equal(before, after)


@pytest.mark.parametrize(("size", "multipliers"), [(8, [1, 2]), (16, [1, 2, 4]), (64, [1, 2, 4, 4, 4]), (28, [1, 2, 4]),
                                                   (9, [1])])
def test_sizes_go_down_to_four_pixels_or_an_odd_number(size, multipliers):
    assert resolved(VAESettings(), size).multipliers == multipliers


@pytest.mark.parametrize(("settings", "words"), [
    (VAESettings(multipliers=[1, 1, 1, 1]), ["model.multipliers", "data.size 12", "at most 3"]),
    (VAESettings(attention=[8]), ["model.attention", "8 pixels", "12, 6, 3", "nearest allowed: 6"]),
    (VAESettings(architecture="mlp", latent="spatial"), ["model.latent", "model.latent vector"]),
])
def test_impossible_settings_are_one_line(settings, words):
    with pytest.raises(UserError) as caught:
        VAE(settings, 12, 1)
    assert all(word in str(caught.value) for word in words), caught.value
