"""The GAN of configs/points/ring.yaml as a loop written by hand: relativistic loss, R1 and R2 at every fourth step, an average
of the generator's weights.

    python ring_loop.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BATCH, LATENT, SIGNS, WIDTH, LAYERS = 128, 8, 6, 64, 4
MODES, DEVIATION = 8, 0.01
R1, R2, EVERY, HALF_LIFE = 5e-4, 5e-4, 4, 15000


def perceptron(inputs: int, outputs: int, activation: type[nn.Module], **options: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(inputs, WIDTH), activation(**options)]
        inputs = WIDTH
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def penalty(discriminator: nn.Module, points: Tensor) -> Tensor:
    """Half the mean squared norm of the discriminator's gradient at the points."""
    points = points.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return gradient.square().sum(1).mean() / 2


def main() -> None:
    generator, discriminator = perceptron(LATENT, 2, nn.ReLU), perceptron(2, 1, nn.LeakyReLU, negative_slope=0.2)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (BATCH / HALF_LIFE)))
    of_discriminator, of_generator = (torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.0, 0.9), eps=1e-5,
                                                        weight_decay=0.0) for network in (discriminator, generator))

    def reals() -> Tensor:
        angles = torch.randint(MODES, (BATCH,)) * (2 * math.pi / MODES)
        return torch.stack([angles.cos(), angles.sin()], 1) + DEVIATION * torch.randn(BATCH, 2)

    def fakes() -> Tensor:
        latents = torch.randn(BATCH, LATENT)
        return generator(torch.cat([latents[:, :SIGNS].sign(), latents[:, SIGNS:]], 1))

    for step in range(10**7):
        real = reals()
        with torch.no_grad():
            fake = fakes()
        on_real, on_fake = discriminator(torch.cat([real, fake])).chunk(2)
        discriminator_loss = F.softplus(on_fake - on_real).mean()
        of_discriminator.zero_grad()
        discriminator_loss.backward()
        of_discriminator.step()
        with torch.no_grad():
            on_real = discriminator(real)
        discriminator.requires_grad_(False)
        generator_loss = F.softplus(on_real - discriminator(fakes())).mean()
        of_generator.zero_grad()
        generator_loss.backward()
        of_generator.step()
        discriminator.requires_grad_(True)
        if step % EVERY == 0:
            with torch.no_grad():
                fake = fakes()
            regularisation = EVERY * (R1 * penalty(discriminator, real) + R2 * penalty(discriminator, fake))
            of_discriminator.zero_grad()
            regularisation.backward()
            of_discriminator.step()
        average.update_parameters(generator)
        losses = discriminator_loss.item(), generator_loss.item()
        if step % 100 == 0:
            print(f"discriminator {losses[0]:.4f}, generator {losses[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
