"""Weights of image networks lie as their images do: no step copies them, and what is saved of them is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from genscale.checkpoint.tensor_files import TensorBuffer
from genscale.families.dcgan.networks import DCGANDiscriminator, DCGANGenerator
from genscale.families.dcgan.residual import ResidualDiscriminator, ResidualGenerator
from genscale.families.dcgan.settings import GANSettings
from genscale.families.vae.network import VAE, VAESettings
from genscale.models.image_layers import InitialWeights
from genscale.parallel.materialise import fill, materialise
from genscale.parallel.pieces import pieces_of
from genscale.rng import torch_generator
from genscale.settings.config import OptimizerSettings
from genscale.training.fingerprints import digest_of
from genscale.training.optimizers import make_optimizer

BATCH, LATENT, SHAPE = 5, 6, (3, 16, 16)
GAN = GANSettings(latent=LATENT, width=4)
NETWORKS = {
    "dcgan generator": lambda: DCGANGenerator(GAN, SHAPE), "dcgan discriminator": lambda: DCGANDiscriminator(GAN, SHAPE),
    "residual generator": lambda: ResidualGenerator(GAN, SHAPE),
    "residual discriminator": lambda: ResidualDiscriminator(GAN, SHAPE),
    "vae": lambda: VAE(VAESettings(width=8, multipliers=(1, 2), latents=LATENT), SHAPE[-1], SHAPE[0]),
}  # fmt: skip


def born(name: str) -> nn.Module:
    """As an engine makes it: shapes first, then memory and values."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    materialise(network, torch.device("cpu"))
    fill(network, InitialWeights(network, 0, 0.1))
    return network


def random(*shape: int, step: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, "input", step))


def loss_of(network: nn.Module, step: int = 0) -> torch.Tensor:
    if isinstance(network, VAE):
        return network(random(BATCH, *SHAPE, step=step), random(BATCH, 1, LATENT, step=step))[3].square().mean()
    is_generator = type(network).__name__.endswith("Generator")
    return network(random(BATCH, *((LATENT,) if is_generator else SHAPE), step=step)).square().mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_copies_no_weight_of_a_convolution(name):
    network = born(name)
    shapes = {tuple(p.shape) for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss_of(network).backward()
    # A kernel hands its gradient over by one copy, which then is the parameter's as it is.
    copies = [event for event in seen.events() if event.name == "aten::copy_" and event.cpu_parent is not None
              and event.cpu_parent.name in ("aten::clone", "torch::autograd::AccumulateGrad")]
    assert shapes and not shapes & {tuple(event.input_shapes[0]) for event in copies}


@pytest.mark.parametrize("channels", [1, 3])
def test_training_with_adamw_is_that_of_contiguous_weights(channels, monkeypatch):
    """Bit for bit, as under the strategies that keep flat weights: a convolution copies these, and a fused step walks through
    memory as it lies. One channel lies both ways at once."""
    monkeypatch.setitem(globals(), "SHAPE", (channels, 16, 16))
    network = born("dcgan discriminator")
    contiguous = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for each in (network, contiguous):
        optimizer = make_optimizer(each, OptimizerSettings(lr=1e-2))
        for step in range(3):
            loss_of(each, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), theirs in zip(network.named_parameters(), contiguous.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_is_saved_and_its_digest_do_not_tell_how_a_weight_lies(tmp_path):
    network = born("vae")
    contiguous = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    buffer, files = TensorBuffer(), []
    for index, each in enumerate((network, contiguous)):
        buffer.take(pieces_of(each.state_dict().items(), 0, 1))
        buffer.write(tmp_path / str(index))
        files.append((tmp_path / str(index)).read_bytes())
    assert files[0] == files[1]
    for (name, ours), theirs in zip(network.named_parameters(), contiguous.parameters(), strict=True):
        assert digest_of(name, 0, ours) == digest_of(name, 0, theirs)
