"""Generators and discriminators: the DCGAN against the tutorial's written out, shapes of all, conditioning, sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from genscale.errors import UserError
from genscale.families.dcgan.networks import DCGANDiscriminator, DCGANGenerator
from genscale.families.dcgan.objective import NETWORKS
from genscale.families.dcgan.settings import GANSettings, check_gan
from genscale.models.image_layers import InitialWeights


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    read = InitialWeights(network, seed, 0.2)
    with torch.no_grad():
        for name, tensor in network.state_dict(keep_vars=True).items():
            tensor.copy_(read(name))
    return network


def test_the_dcgan_is_that_of_the_paper():
    """Written out for 32 pixels: 4x4 from the latent, transposed convolutions of 4, BatchNorm and ReLU; the mirror image with
    LeakyReLU(0.2), without BatchNorm at the image."""
    settings = GANSettings(latent=10, width=4)
    generator = filled(DCGANGenerator(settings, (3, 32, 32)))
    theirs = nn.Sequential(nn.ConvTranspose2d(10, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                           nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                           nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                           nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False), nn.Tanh())
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), generator.parameters(), strict=True):
            a.copy_(b if a.shape == b.shape else b.T.reshape(a.shape))
    latents = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    images = generator(latents)
    torch.testing.assert_close(images, theirs(latents[:, :, None, None]), rtol=1e-4, atol=1e-5)

    discriminator = filled(DCGANDiscriminator(settings, (3, 32, 32)))
    theirs = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
                           nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
                           nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
                           nn.Conv2d(16, 1, 4, 1, 0, bias=False))
    ours = {tuple(p.shape) if p.ndim > 2 else p.numel(): p for p in discriminator.parameters() if p.ndim > 1}
    with torch.no_grad():
        for a in theirs.parameters():
            if a.ndim > 1:
                b = ours.get(tuple(a.shape), ours.get(a.numel()))
                a.copy_(b.reshape(a.shape))
        for a, b in zip([m for m in theirs if isinstance(m, nn.BatchNorm2d)], [s.norm for s in discriminator.stages[1:]],
                        strict=True):
            a.weight.copy_(b.weight)
    torch.testing.assert_close(discriminator(images), theirs(images).flatten(), rtol=1e-4, atol=1e-5)


def test_biases_stand_where_no_norm_follows():
    for norm, expected in (("batch", []), ("none", ["input.linear.bias", "stages.0.conv.bias", "output.bias"])):
        generator = DCGANGenerator(GANSettings(width=2, generator_norm=norm), (1, 16, 16))
        names = [name for name, _ in generator.named_parameters()]
        assert [name for name in names if name.endswith("bias") and "norm" not in name] == expected


@pytest.mark.parametrize("size", [16, 64, 512])
@pytest.mark.parametrize(("architecture", "upsampling"), [("dcgan", "transposed"), ("dcgan", "resize"),
                                                          ("residual", "transposed")])
def test_any_power_of_two(size, architecture, upsampling):
    settings = GANSettings(architecture=architecture, width=2, latent=3, upsampling=upsampling, max_multiplier=2)
    shape = (1, size, size)
    check_gan(settings, shape)
    generator, discriminator = (filled(cls(settings, shape)) for cls in NETWORKS[architecture])
    images = generator(torch.randn(2, 3))
    assert images.shape == (2, *shape) and images.abs().max() <= 1
    assert discriminator(images).shape == (2,)
    assert len(generator.blocks()) >= (size // 4).bit_length() - 2


@pytest.mark.parametrize(("architecture", "conditioning"), [("dcgan", "projection"), ("dcgan", "embedding"),
                                                            ("residual", "projection"), ("residual", "embedding"),
                                                            ("mlp", "projection")])
@pytest.mark.parametrize("spectral", [False, True])
def test_both_networks_see_the_class(architecture, conditioning, spectral):
    settings = GANSettings(architecture=architecture, width=4, latent=3, classes=3, conditioning=conditioning,
                           spectral_norm=spectral, discriminator_norm="none", generator_norm="group")
    generator, discriminator = (filled(cls(settings, (1, 16, 16))) for cls in NETWORKS[architecture])
    latents, labels = torch.ones(3, 3), torch.arange(3)
    images = generator(latents, labels)
    logits = discriminator(images[:1].expand(3, -1, -1, -1), labels)
    assert len({round(x, 6) for x in images.sum((1, 2, 3)).tolist()}) == 3
    assert len({round(x, 7) for x in logits.tolist()}) == 3


def test_the_large_pair_has_over_a_hundred_million_parameters():
    settings = GANSettings(width=256)
    with torch.device("meta"):
        networks = [cls(settings, (3, 256, 256)) for cls in NETWORKS["dcgan"]]
    assert sum(p.numel() for network in networks for p in network.parameters()) > 100e6


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match="data.size: 48 .*nearest is (32|64)"):
        check_gan(GANSettings(), (3, 48, 48))
    check_gan(GANSettings(architecture="mlp"), (1, 28, 28))
    with pytest.raises(UserError, match="model.conditioning: embedding"):
        check_gan(GANSettings(architecture="mlp", classes=2, conditioning="embedding"), (1, 28, 28))


def test_settings_have_no_dead_field():
    """Each field changes some network: a field that does not is a dead option."""
    plain = GANSettings(latent=3, width=4)
    changed = {"latent": 4, "width": 8, "discriminator_width": 8, "max_multiplier": 1, "upsampling": "resize",
               "architecture": "mlp", "generator_norm": "none", "discriminator_norm": "none", "spectral_norm": True,
               "classes": 2}

    def names(settings: GANSettings) -> list[tuple]:
        with torch.device("meta"):
            networks = [cls(settings, (1, 16, 16)) for cls in NETWORKS[settings.architecture]]
        return [(name, tensor.shape) for network in networks for name, tensor in network.state_dict().items()]

    for field, value in changed.items():
        assert names(dataclasses.replace(plain, **{field: value})) != names(plain), field
    mlp = GANSettings(architecture="mlp", latent=3, width=4)
    assert names(dataclasses.replace(mlp, hidden_layers=3)) != names(mlp)
    conditional = dataclasses.replace(plain, classes=2)
    assert names(dataclasses.replace(conditional, conditioning="embedding")) != names(conditional)
